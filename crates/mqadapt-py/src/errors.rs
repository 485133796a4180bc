//! One map from the crates' errors to Python exceptions.
//!
//! I/O errors stay `OSError` (the subclass follows from the error number), bad arguments are `ArgumentError` (a
//! `ValueError`), an interrupt is `KeyboardInterrupt`, everything else is `MqadaptError`. Every message passes `readable`: what
//! it quotes from a file reaches a terminal without control characters, and shortened.

use mqadapt_core::readable;
use pyo3::exceptions::{PyFileExistsError, PyKeyboardInterrupt, PyOSError};
use pyo3::prelude::*;

mod python {
    pyo3::import_exception!(mqadapt_rs.errors, ArgumentError);
    pyo3::import_exception!(mqadapt_rs.errors, MqadaptError);
}

/// Becomes a Python exception.
pub(crate) trait IntoPyErr {
    fn into_py_err(self) -> PyErr;
}

/// `result.or_raise()?`
pub(crate) trait OrRaise<T> {
    fn or_raise(self) -> PyResult<T>;
}

impl<T, E: IntoPyErr> OrRaise<T> for Result<T, E> {
    fn or_raise(self) -> PyResult<T> {
        self.map_err(IntoPyErr::into_py_err)
    }
}

/// A bad argument.
pub(crate) fn argument(message: impl Into<String>) -> PyErr {
    python::ArgumentError::new_err(readable(&message.into()))
}

/// Wrong content of a file, or work that cannot be done.
pub(crate) fn failure(message: impl Into<String>) -> PyErr {
    python::MqadaptError::new_err(readable(&message.into()))
}

/// An I/O error with our message; the number picks `FileNotFoundError`, `PermissionError` and so on.
pub(crate) fn io(message: &str, error: &std::io::Error) -> PyErr {
    let message = readable(message);
    match error.raw_os_error() {
        Some(number) => PyOSError::new_err((number, message)),
        None => PyOSError::new_err(message),
    }
}

/// Whether an argument (a plan, a family) is what is wrong, not a file of the model.
fn is_about_an_argument(error: &mqadapt_core::Error) -> bool {
    use mqadapt_core::Error;
    matches!(
        error,
        Error::PlanSyntax { .. }
            | Error::PlanLength { .. }
            | Error::PlanLayer { .. }
            | Error::PlanHeads { .. }
            | Error::PlanStorage { .. }
            | Error::UnknownFamily { .. }
            | Error::KnownModelType { .. }
            | Error::Syntax { what: "plan", .. }
    )
}

impl IntoPyErr for mqadapt_core::Error {
    fn into_py_err(self) -> PyErr {
        if is_about_an_argument(&self) { argument(self.to_string()) } else { failure(self.to_string()) }
    }
}

impl IntoPyErr for mqadapt_checkpoint::Error {
    fn into_py_err(self) -> PyErr {
        use mqadapt_checkpoint::Error;
        let message = self.to_string();
        match self {
            Error::Io { source, .. } => io(&message, &source),
            Error::Config { source, .. } | Error::Plan(source) if is_about_an_argument(&source) => argument(message),
            _ => failure(message),
        }
    }
}

impl IntoPyErr for mqadapt_convert::Error {
    fn into_py_err(self) -> PyErr {
        use mqadapt_convert::Error;
        let message = self.to_string();
        match self {
            Error::Checkpoint(error) => error.into_py_err(),
            Error::Io { source, .. } => io(&message, &source),
            Error::Exists { .. } | Error::Appeared { .. } => PyFileExistsError::new_err(readable(&message)),
            Error::NoSpace { .. } => io(&message, &std::io::Error::from_raw_os_error(libc::ENOSPC)),
            Error::InPlace { .. }
            | Error::Unnamed { .. }
            | Error::NotReplaceable { .. }
            | Error::Method { .. }
            | Error::Target { .. } => argument(message),
            Error::Interrupted(interrupted) => interrupted.into_py_err(),
            _ => failure(message),
        }
    }
}

impl IntoPyErr for mqadapt_model::Error {
    fn into_py_err(self) -> PyErr {
        use mqadapt_model::Error;
        let message = self.to_string();
        match self {
            Error::Checkpoint(error) => error.into_py_err(),
            Error::Config(error) => error.into_py_err(),
            Error::Io { source, .. } => io(&message, &source),
            Error::Method { .. }
            | Error::Token { .. }
            | Error::Argument { .. }
            | Error::Device { .. }
            | Error::Storage { .. }
            | Error::Context { .. }
            | Error::CalibrationContext { .. }
            | Error::NotRunnable { .. } => argument(message),
            Error::Interrupted(interrupted) => interrupted.into_py_err(),
            _ => failure(message),
        }
    }
}

impl IntoPyErr for mqadapt_calibrate::Error {
    fn into_py_err(self) -> PyErr {
        use mqadapt_calibrate::Error;
        let message = self.to_string();
        match self {
            Error::Checkpoint(error) => error.into_py_err(),
            Error::Model(error) => error.into_py_err(),
            Error::Io { source, .. } => io(&message, &source),
            Error::Argument { .. } => argument(message),
            Error::Interrupted(interrupted) => interrupted.into_py_err(),
            _ => failure(message),
        }
    }
}

impl IntoPyErr for mqadapt_core::Interrupted {
    fn into_py_err(self) -> PyErr {
        PyKeyboardInterrupt::new_err(self.to_string())
    }
}
