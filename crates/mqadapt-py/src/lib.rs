//! Python bindings: the private module mqadapt_rs._core.
