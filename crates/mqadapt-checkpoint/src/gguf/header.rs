//! The header of a GGUF file. In: bytes that may be anything. Out: metadata and where every tensor lies, checked.
//!
//! Little-endian versions 2 and 3 (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>). Every count is compared
//! with the bytes that are left before anything is allocated for it.

use std::collections::BTreeMap;

use super::ggml_type::GgmlType;
use super::metadata::{Metadata, Value};
use super::problem::{Parsed, Problem};
use super::source::Source;

/// More than any tokenizer and tensor list needs; bounds what a hostile header can make us hold in memory.
const LARGEST_HEADER: u64 = 1 << 29;
const DEFAULT_ALIGNMENT: u64 = 32;
const LARGEST_ALIGNMENT: u64 = 1 << 20;
/// `GGML_MAX_NAME`, `GGML_MAX_DIMS`.
const LONGEST_NAME: u64 = 64;
const HIGHEST_RANK: u32 = 4;
const LONGEST_KEY: u64 = 65_535;

/// A tensor as the file has it.
#[derive(Debug, Clone)]
pub(super) struct GgufTensor {
    pub name: String,
    pub ty: GgmlType,
    /// Outermost dimension first, as Hugging Face has it; GGUF stores the innermost first.
    pub shape: Vec<usize>,
    /// From the start of the file.
    pub offset: u64,
    pub bytes: u64,
}

#[derive(Debug)]
pub(super) struct Header {
    pub metadata: Metadata,
    pub tensors: Vec<GgufTensor>,
}

impl Header {
    pub(super) fn read(source: &dyn Source) -> Parsed<Self> {
        let mut cursor = Cursor { source, position: 0, window: Vec::new(), window_start: 0 };
        let (tensor_count, pair_count) = preamble(&mut cursor)?;
        let metadata = metadata(&mut cursor, pair_count)?;
        let mut tensors = tensor_infos(&mut cursor, tensor_count)?;
        let alignment = alignment(&metadata)?;
        let data_start = cursor.position.next_multiple_of(alignment);
        for tensor in &mut tensors {
            place(tensor, data_start, alignment, source.bytes())?;
        }
        refuse_overlaps(&tensors)?;
        Ok(Self { metadata, tensors })
    }

    pub(super) fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }
}

fn preamble(cursor: &mut Cursor) -> Parsed<(u64, u64)> {
    let magic = cursor.array::<4>("the magic")?;
    if &magic != b"GGUF" {
        let detail = format!("are {magic:02x?}, not 'GGUF'; expected a GGUF file, or a folder in Hugging Face layout");
        return Err(Problem::new("the first four bytes", detail));
    }
    let version = cursor.u32("the version")?;
    match version {
        2 | 3 => {}
        _ if matches!(version.swap_bytes(), 1..=3) => {
            return Err(Problem::new("the version", "the file is big-endian; only little-endian files are read"));
        }
        _ => {
            let advice = "expected GGUF version 2 or 3; convert the model again with a current llama.cpp";
            return Err(Problem::new("the version", format!("{advice} (found {version})")));
        }
    }
    let tensors = cursor.u64("the tensor count")?;
    let pairs = cursor.u64("the metadata count")?;
    // the least that a tensor (length, rank, one dimension, type, offset) and a pair (length, type, value) can take
    cursor.fits(tensors, 8 + 4 + 8 + 4 + 8, "the tensor count")?;
    cursor.fits(pairs, 8 + 4 + 1, "the metadata count")?;
    Ok((tensors, pairs))
}

fn metadata(cursor: &mut Cursor, count: u64) -> Parsed<Metadata> {
    let mut pairs = BTreeMap::new();
    for index in 0..count {
        let key = cursor.text(LONGEST_KEY, &format!("metadata key number {index}"))?;
        let place = format!("metadata key '{}'", key.escape_debug());
        let kind = cursor.u32(&place)?;
        let value = value(cursor, kind, &place)?;
        if pairs.insert(key, value).is_some() {
            return Err(Problem::new(place, "occurs twice"));
        }
    }
    Ok(Metadata(pairs))
}

fn value(cursor: &mut Cursor, kind: u32, place: &str) -> Parsed<Value> {
    Ok(match kind {
        0 => Value::Unsigned(u64::from(u8::from_le_bytes(cursor.array(place)?))),
        1 => Value::Signed(i64::from(i8::from_le_bytes(cursor.array(place)?))),
        2 => Value::Unsigned(u64::from(u16::from_le_bytes(cursor.array(place)?))),
        3 => Value::Signed(i64::from(i16::from_le_bytes(cursor.array(place)?))),
        4 => Value::Unsigned(u64::from(cursor.u32(place)?)),
        5 => Value::Signed(i64::from(i32::from_le_bytes(cursor.array(place)?))),
        6 => Value::F32(f32::from_le_bytes(cursor.array(place)?)),
        7 => Value::Bool(cursor.bool(place)?),
        8 => Value::Text(cursor.text(LARGEST_HEADER, place)?),
        9 => array(cursor, place)?,
        10 => Value::Unsigned(cursor.u64(place)?),
        11 => Value::Signed(i64::from_le_bytes(cursor.array(place)?)),
        12 => Value::F64(f64::from_le_bytes(cursor.array(place)?)),
        _ => return Err(Problem::new(place, format!("has the unknown value type {kind}"))),
    })
}

fn array(cursor: &mut Cursor, place: &str) -> Parsed<Value> {
    let kind = cursor.u32(place)?;
    let count = cursor.u64(place)?;
    let least = match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        8 | 10..=12 => 8,
        9 => return Err(Problem::new(place, "is an array of arrays, which is not supported")),
        _ => return Err(Problem::new(place, format!("is an array of the unknown value type {kind}"))),
    };
    cursor.fits(count, least, place)?;
    Ok(match kind {
        0 => Value::Unsigneds(cursor.list(count, place, |b: [u8; 1]| u64::from(b[0]))?),
        1 => Value::Signeds(cursor.list(count, place, |b| i64::from(i8::from_le_bytes(b)))?),
        2 => Value::Unsigneds(cursor.list(count, place, |b| u64::from(u16::from_le_bytes(b)))?),
        3 => Value::Signeds(cursor.list(count, place, |b| i64::from(i16::from_le_bytes(b)))?),
        4 => Value::Unsigneds(cursor.list(count, place, |b| u64::from(u32::from_le_bytes(b)))?),
        5 => Value::Signeds(cursor.list(count, place, |b| i64::from(i32::from_le_bytes(b)))?),
        6 => Value::F32s(cursor.list(count, place, f32::from_le_bytes)?),
        7 => Value::Bools((0..count).map(|_| cursor.bool(place)).collect::<Parsed<_>>()?),
        8 => Value::Texts((0..count).map(|_| cursor.text(LARGEST_HEADER, place)).collect::<Parsed<_>>()?),
        10 => Value::Unsigneds(cursor.list(count, place, u64::from_le_bytes)?),
        11 => Value::Signeds(cursor.list(count, place, i64::from_le_bytes)?),
        _ => Value::F64s(cursor.list(count, place, f64::from_le_bytes)?),
    })
}

/// The list of tensors, their offsets still relative to the data.
fn tensor_infos(cursor: &mut Cursor, count: u64) -> Parsed<Vec<GgufTensor>> {
    let mut tensors: Vec<GgufTensor> = Vec::new();
    let mut names = std::collections::HashSet::new();
    for index in 0..count {
        let name = cursor.text(LONGEST_NAME, &format!("the name of tensor number {index}"))?;
        let place = format!("tensor '{}'", name.escape_debug());
        if !names.insert(name.clone()) {
            return Err(Problem::new(place, "occurs twice"));
        }
        let rank = cursor.u32(&place)?;
        if !(1..=HIGHEST_RANK).contains(&rank) {
            return Err(Problem::new(place, format!("expected 1 to {HIGHEST_RANK} dimensions, found {rank}")));
        }
        let mut shape = Vec::new();
        for _ in 0..rank {
            let size = cursor.u64(&place)?;
            let size = usize::try_from(size).ok().filter(|&size| size > 0);
            shape.push(size.ok_or_else(|| Problem::new(&place, "has a dimension of zero or beyond this machine"))?);
        }
        shape.reverse();
        let ty = GgmlType::from_number(cursor.u32(&place)?).map_err(|found| {
            let supported: Vec<_> = GgmlType::ALL.iter().map(|ty| ty.name()).collect();
            Problem::new(&place, format!("has type {found}; supported are {}", supported.join(", ")))
        })?;
        let offset = cursor.u64(&place)?;
        tensors.push(GgufTensor { name, ty, shape, offset, bytes: 0 });
    }
    Ok(tensors)
}

fn alignment(metadata: &Metadata) -> Parsed<u64> {
    let key = "general.alignment";
    let alignment = metadata.integer(key)?.unwrap_or(DEFAULT_ALIGNMENT);
    if alignment.is_power_of_two() && alignment <= LARGEST_ALIGNMENT {
        return Ok(alignment);
    }
    Err(Problem::key(key, format!("expected a power of two up to {LARGEST_ALIGNMENT}, found {alignment}")))
}

/// Checks a tensor's extent and makes its offset absolute.
fn place(tensor: &mut GgufTensor, data_start: u64, alignment: u64, file_bytes: u64) -> Parsed<()> {
    let row = tensor.shape.last().copied().unwrap_or_default();
    let block = tensor.ty.block_values();
    if !row.is_multiple_of(block) {
        let detail = format!("has rows of {row} values, not a multiple of {}'s block of {block}", tensor.ty.name());
        return Err(Problem::tensor(&tensor.name, detail));
    }
    let values = tensor.shape.iter().try_fold(1_u64, |product, &size| product.checked_mul(u64::try_from(size).ok()?));
    // values of the whole tensor as f32 must be addressable too
    let values = values.filter(|&values| values.checked_mul(4).is_some_and(|bytes| usize::try_from(bytes).is_ok()));
    let bytes = values.and_then(|values| (values / block as u64).checked_mul(tensor.ty.block_bytes() as u64));
    let Some(bytes) = bytes else {
        return Err(Problem::tensor(&tensor.name, format!("has a shape that overflows: {:?}", tensor.shape)));
    };
    if !tensor.offset.is_multiple_of(alignment) {
        let detail = format!("starts at {}, which is not a multiple of the alignment {alignment}", tensor.offset);
        return Err(Problem::tensor(&tensor.name, detail));
    }
    let start = tensor.offset.checked_add(data_start);
    let end = start.and_then(|start| start.checked_add(bytes)).filter(|&end| end <= file_bytes);
    let (Some(start), Some(_)) = (start, end) else {
        let detail =
            format!("reaches beyond the end of the file ({file_bytes} bytes); the file is truncated or corrupt");
        return Err(Problem::tensor(&tensor.name, detail));
    };
    (tensor.offset, tensor.bytes) = (start, bytes);
    Ok(())
}

fn refuse_overlaps(tensors: &[GgufTensor]) -> Parsed<()> {
    let mut by_offset: Vec<_> = tensors.iter().collect();
    by_offset.sort_by_key(|tensor| tensor.offset);
    for pair in by_offset.windows(2) {
        if let [first, second] = pair
            && first.offset + first.bytes > second.offset
        {
            return Err(Problem::tensor(&second.name, format!("overlaps tensor '{}'", first.name.escape_debug())));
        }
    }
    Ok(())
}

/// Reads forward through the header, a window at a time.
struct Cursor<'a> {
    source: &'a dyn Source,
    position: u64,
    window: Vec<u8>,
    window_start: u64,
}

const WINDOW: u64 = 1 << 16;

impl Cursor<'_> {
    fn left(&self) -> u64 {
        self.source.bytes().min(LARGEST_HEADER).saturating_sub(self.position)
    }

    /// Refuses a count whose entries, `least` bytes each at least, cannot be in what is left of the file.
    fn fits(&self, count: u64, least: u64, place: &str) -> Parsed<()> {
        if count.checked_mul(least).is_some_and(|bytes| bytes <= self.left()) {
            return Ok(());
        }
        let detail = format!(
            "needs {count} entries, more than the remaining {} bytes can hold; the file is truncated",
            self.left()
        );
        Err(Problem::new(place, detail))
    }

    /// The next `count` bytes.
    fn take(&mut self, count: u64, place: &str) -> Parsed<Vec<u8>> {
        self.fits(count, 1, place)?;
        let mut out = Vec::with_capacity(usize::try_from(count).unwrap_or_default());
        while (out.len() as u64) < count {
            self.fill()?;
            let skip = usize::try_from(self.position - self.window_start).unwrap_or_default();
            let wanted = usize::try_from(count).unwrap_or_default() - out.len();
            let ready = self.window.get(skip..).unwrap_or_default();
            let part = ready.get(..wanted).unwrap_or(ready);
            out.extend_from_slice(part);
            self.position += part.len() as u64;
        }
        Ok(out)
    }

    /// Moves the window so that it holds at least one byte at the position.
    fn fill(&mut self) -> Parsed<()> {
        let window_end = self.window_start + self.window.len() as u64;
        if (self.window_start..window_end).contains(&self.position) {
            return Ok(());
        }
        let length = usize::try_from(self.left().min(WINDOW)).unwrap_or_default();
        self.window.resize(length, 0);
        self.window_start = self.position;
        self.source.read_exact_at(self.position, &mut self.window)?;
        Ok(())
    }

    fn array<const N: usize>(&mut self, place: &str) -> Parsed<[u8; N]> {
        let mut out = [0; N];
        self.fits(N as u64, 1, place)?;
        // fast path: wholly inside the window
        let skip = usize::try_from(self.position.wrapping_sub(self.window_start)).unwrap_or(usize::MAX);
        if let Some(bytes) = skip.checked_add(N).and_then(|end| self.window.get(skip..end)) {
            out.copy_from_slice(bytes);
            self.position += N as u64;
        } else {
            out.copy_from_slice(&self.take(N as u64, place)?);
        }
        Ok(out)
    }

    fn u32(&mut self, place: &str) -> Parsed<u32> {
        self.array(place).map(u32::from_le_bytes)
    }

    fn u64(&mut self, place: &str) -> Parsed<u64> {
        self.array(place).map(u64::from_le_bytes)
    }

    fn bool(&mut self, place: &str) -> Parsed<bool> {
        match self.array::<1>(place)? {
            [0] => Ok(false),
            [1] => Ok(true),
            [found] => Err(Problem::new(place, format!("expected a boolean, 0 or 1, found {found}"))),
        }
    }

    fn list<T, const N: usize>(&mut self, count: u64, place: &str, read: impl Fn([u8; N]) -> T) -> Parsed<Vec<T>> {
        (0..count).map(|_| self.array(place).map(&read)).collect()
    }

    fn text(&mut self, longest: u64, place: &str) -> Parsed<String> {
        let length = self.u64(place)?;
        if length > longest {
            return Err(Problem::new(place, format!("has a string of {length} bytes; at most {longest} are allowed")));
        }
        let bytes = self.take(length, place)?;
        String::from_utf8(bytes).map_err(|_| Problem::new(place, "has a string that is not UTF-8"))
    }
}
