//! Tests of merging from calibration text on tiny random checkpoints.

mod calibration;
#[path = "../../../mqadapt-model/src/tests/fixtures.rs"]
mod fixtures;

use mqadapt_model::{LoadOptions, Model};
