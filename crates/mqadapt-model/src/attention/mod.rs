//! The forms of attention, by what they cache: a new form is one file.

mod heads;

pub(crate) use heads::Attention;
