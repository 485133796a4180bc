//! The forward pass: load, score, generate.
