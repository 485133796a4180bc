//! A plan as the user gives it: the grammar, or the path of a file.

use std::path::Path;

use mqadapt_core::{ModelConfig, Plan, PlanDocument};

use crate::file::{MAX_PLAN_BYTES, read_small};
use crate::{Error, Result};

/// Reads a plan: a path that ends in `.json`, `.yaml` or `.yml`, or the grammar of [`Plan::parse`].
///
/// # Errors
/// [`Error::Io`] for the file, [`Error::Config`] for its content, [`Error::Plan`] for the grammar.
pub fn read_plan(text_or_path: &str, config: &ModelConfig) -> Result<Plan> {
    match read_plan_file(text_or_path)? {
        None => Plan::parse(text_or_path, config).map_err(Error::Plan),
        Some(document) => {
            let path = Path::new(text_or_path.trim()).to_owned();
            document.plan(config).map_err(|source| Error::Config { path, source })
        }
    }
}

/// Reads a plan file: what ends in `.json`, `.yaml` or `.yml`. `None` for other texts.
///
/// # Errors
/// [`Error::Io`] for the file, [`Error::Config`] for its content.
pub fn read_plan_file(text_or_path: &str) -> Result<Option<PlanDocument>> {
    let path = Path::new(text_or_path.trim());
    let is_file = path.extension().is_some_and(|e| ["json", "yaml", "yml"].iter().any(|known| e == *known));
    if !is_file {
        return Ok(None);
    }
    let wrong = |source| Error::Config { path: path.to_owned(), source };
    let text = String::from_utf8(read_small(path, MAX_PLAN_BYTES)?)
        .map_err(|e| wrong(mqadapt_core::Error::Syntax { what: "plan", detail: e.to_string() }))?;
    PlanDocument::parse(&text).map(Some).map_err(wrong)
}
