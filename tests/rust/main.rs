//! The integration tests of the workspace: one binary, a module for each subject.

mod convert;
mod fault;
mod foreign;
mod hostile;
mod injected;
mod not_finite;
mod remote_shard;
mod synthetic;
mod verify;
