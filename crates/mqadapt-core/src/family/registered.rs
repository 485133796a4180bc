//! Families that a person insists on for a `model_type` that is not known: for the whole process.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};

use super::{FAMILIES, Family};
use crate::{Error, Result};

/// By `model_type`; `None`: of every other one that is not known.
static REGISTERED: RwLock<BTreeMap<Option<String>, &'static Family>> = RwLock::new(BTreeMap::new());

/// The known family of this `model_type`.
#[must_use]
pub fn known(model_type: &str) -> Option<&'static Family> {
    FAMILIES.iter().copied().find(|family| family.model_type == model_type)
}

/// From now on, a checkpoint of this `model_type` (`None`: of any that is not known) is read as one of the family.
///
/// # Errors
/// [`Error::UnknownFamily`]; [`Error::KnownModelType`] for one that has a family.
pub fn register(model_type: Option<&str>, family: &str) -> Result<()> {
    let own = known(family).ok_or_else(|| Error::UnknownFamily { found: family.to_owned(), supported: supported() })?;
    if let Some(model_type) = model_type.filter(|model_type| known(model_type).is_some()) {
        return Err(Error::KnownModelType { model_type: model_type.to_owned(), family: own.model_type });
    }
    let mut registered = REGISTERED.write().unwrap_or_else(PoisonError::into_inner);
    registered.insert(model_type.map(str::to_owned), own);
    Ok(())
}

/// What was registered: `model_type` and the family's.
#[must_use]
pub fn registered() -> Vec<(Option<String>, &'static str)> {
    let registered = REGISTERED.read().unwrap_or_else(PoisonError::into_inner);
    registered.iter().map(|(model_type, family)| (model_type.clone(), family.model_type)).collect()
}

/// The family that a checkpoint of this `model_type` is read as.
///
/// # Errors
/// [`Error::UnknownModelType`]; [`Error::KnownModelType`] where a person insists on another family than that of a known one.
pub(crate) fn of(model_type: &str) -> Result<&'static Family> {
    let registered = REGISTERED.read().unwrap_or_else(PoisonError::into_inner);
    let insisted = registered.get(&None).copied();
    let Some(family) = known(model_type) else {
        let own = registered.get(&Some(model_type.to_owned())).copied().or(insisted);
        return own.ok_or_else(|| Error::UnknownModelType {
            found: model_type.to_owned(),
            nearest: nearest(model_type),
            supported: supported(),
        });
    };
    // what is written may be of the family that holds merged heads
    let same =
        |other: &Family| other.model_type == model_type || other.merged.is_some_and(|own| own.model_type == model_type);
    match insisted.filter(|other| !same(other)) {
        Some(other) => Err(Error::KnownModelType { model_type: model_type.to_owned(), family: other.model_type }),
        None => Ok(family),
    }
}

fn supported() -> String {
    FAMILIES.iter().map(|family| family.model_type).collect::<Vec<_>>().join(", ")
}

/// The `model_type` in [`FAMILIES`] that is most like this one.
fn nearest(model_type: &str) -> &'static str {
    // the beginning of a name says more than its length: qwen2_moe is a qwen2
    let likeness = |family: &&&Family| strsim::jaro_winkler(family.model_type, model_type);
    let nearest = FAMILIES.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    nearest.map_or("llama", |family| family.model_type)
}
