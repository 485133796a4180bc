//! The header of a safetensors file. In: bytes that may be anything; out: where each tensor is, checked.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use crate::error::HeaderProblem;

/// Longest header that is read, as in the safetensors crate.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The header of a safetensors file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// `__metadata__`, in the file's order.
    pub metadata: Option<Vec<(String, String)>>,
    /// The tensors, by offset.
    pub entries: Vec<HeaderEntry>,
    /// Where the data begins in the file.
    pub data_start: u64,
}

/// A tensor of the header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderEntry {
    /// Its name.
    pub name: String,
    /// Its dtype.
    pub dtype: safetensors::Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Where it begins, after the header.
    pub start: u64,
    /// Its bytes.
    pub bytes: u64,
}

/// Bytes of the JSON header, from the first 8 bytes of a file of this length.
///
/// # Errors
/// [`HeaderProblem::TooShort`], [`HeaderProblem::TooLong`], [`HeaderProblem::Truncated`].
pub fn header_bytes(prefix: [u8; 8], file_len: u64) -> Result<usize, HeaderProblem> {
    let available = file_len.checked_sub(8).ok_or(HeaderProblem::TooShort { len: file_len })?;
    let claimed = u64::from_le_bytes(prefix);
    if claimed > MAX_HEADER_BYTES {
        return Err(HeaderProblem::TooLong { len: claimed, max: MAX_HEADER_BYTES });
    }
    if claimed > available {
        return Err(HeaderProblem::Truncated { claimed, found: available });
    }
    usize::try_from(claimed).map_err(|_| HeaderProblem::TooLong { len: claimed, max: MAX_HEADER_BYTES })
}

impl Header {
    /// Parses the JSON of a header (without the 8 bytes before it) of a file of `file_len` bytes.
    ///
    /// # Errors
    /// The [`HeaderProblem`] that applies.
    pub fn parse(json: &[u8], file_len: u64) -> Result<Self, HeaderProblem> {
        if json.first() != Some(&b'{') {
            return Err(HeaderProblem::Syntax { detail: "it does not begin with '{'".to_owned() });
        }
        let raw: RawHeader =
            serde_json::from_slice(json).map_err(|e| HeaderProblem::Syntax { detail: e.to_string() })?;
        let data_start = 8 + json.len() as u64;
        let mut entries = raw.entries.into_iter().map(HeaderEntry::check).collect::<Result<Vec<_>, _>>()?;
        // the sort is stable and empty tensors share offsets, so the order of the header decides among those
        entries.sort_by_key(|entry| (entry.start, entry.start + entry.bytes));
        let mut expected = 0;
        for entry in &entries {
            if entry.start != expected {
                let (name, start) = (entry.name.clone(), entry.start);
                return Err(HeaderProblem::NotContiguous { name, start, expected });
            }
            expected = entry.start + entry.bytes;
        }
        let found = file_len.saturating_sub(data_start);
        if found != expected {
            return Err(HeaderProblem::Length { expected, found });
        }
        let mut names: Vec<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(HeaderProblem::Duplicate { name: pair[0].to_owned() });
        }
        Ok(Self { metadata: raw.metadata, entries, data_start })
    }
}

impl HeaderEntry {
    fn check((name, raw): (String, RawEntry)) -> Result<Self, HeaderProblem> {
        let bits = raw.shape.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim as u64));
        let Some(bits) = bits.and_then(|values| values.checked_mul(raw.dtype.bitsize() as u64)) else {
            return Err(HeaderProblem::Overflow { name, shape: raw.shape });
        };
        let (start, end) = raw.data_offsets;
        if !bits.is_multiple_of(8) || end.checked_sub(start) != Some(bits / 8) {
            return Err(HeaderProblem::Size { name, expected: bits.div_ceil(8), start, end });
        }
        Ok(Self { name, dtype: raw.dtype, shape: raw.shape, start, bytes: bits / 8 })
    }
}

#[derive(Deserialize)]
struct RawEntry {
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

struct RawHeader {
    metadata: Option<Vec<(String, String)>>,
    entries: Vec<(String, RawEntry)>,
}

/// By hand, because a map would silently keep the last of two equal keys.
impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut header = RawHeader { metadata: None, entries: Vec::new() };
                while let Some(key) = map.next_key::<String>()? {
                    if key != "__metadata__" {
                        header.entries.push((key, map.next_value()?));
                    } else if header.metadata.replace(map.next_value::<Pairs<String>>()?.0).is_some() {
                        return Err(serde::de::Error::custom("'__metadata__' occurs twice"));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// A JSON object in its own order, in which no key occurs twice.
pub(crate) struct Pairs<T>(pub Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Pairs<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PairsVisitor<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for PairsVisitor<T> {
            type Value = Pairs<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs<T>, A::Error> {
                let mut pairs = Vec::new();
                let mut seen = std::collections::HashSet::new();
                while let Some((key, value)) = map.next_entry::<String, T>()? {
                    if !seen.insert(key.clone()) {
                        return Err(serde::de::Error::custom(format_args!("'{key}' occurs twice")));
                    }
                    pairs.push((key, value));
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(PairsVisitor(std::marker::PhantomData))
    }
}

#[cfg(test)]
mod tests;
