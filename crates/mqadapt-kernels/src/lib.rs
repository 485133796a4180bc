//! CPU kernels of the forward pass, chosen for the processor at run time.
