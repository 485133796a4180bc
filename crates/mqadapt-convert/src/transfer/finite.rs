//! Values that are copied although they are not finite. In: the bytes of a file as they pass; out: how many of each tensor.

use std::collections::BTreeMap;

use mqadapt_checkpoint::not_finite;

use crate::layout::OutputTensor;

/// Counts values that are infinite or not a number while they are in the processor's cache, on the way to the file.
#[derive(Debug, Default)]
pub(crate) struct FiniteScan {
    /// Begin of a value whose end comes with the next piece.
    begun: Vec<u8>,
    /// By the tensor's place in the source.
    found: BTreeMap<usize, u64>,
}

impl FiniteScan {
    /// Looks at a piece of a file, from byte `at` of the file on; `tensors` are all of that file, by offset.
    pub fn look(&mut self, tensors: &[OutputTensor], at: u64, bytes: &[u8]) {
        let end = at + bytes.len() as u64;
        let first = tensors.partition_point(|tensor| tensor.offset + tensor.bytes <= at);
        let here = tensors.get(first..).unwrap_or_default().iter().take_while(|tensor| tensor.offset < end);
        for tensor in here {
            let Some(size) = tensor.dtype.value_bytes() else { continue };
            let (from, to) = (tensor.offset.max(at), (tensor.offset + tensor.bytes).min(end));
            let Some(mut part) = bytes.get((from - at) as usize..(to - at) as usize) else { continue };
            let before = (from - tensor.offset) as usize % size; // bytes of the first value that came before
            if before == 0 {
                self.begun.clear();
            } else {
                let (rest, others) = part.split_at((size - before).min(part.len()));
                self.begun.extend_from_slice(rest);
                part = others;
                if before + rest.len() == size {
                    // less than a value where the piece before was not seen, because an earlier run wrote it
                    self.add(tensor.source, not_finite(tensor.dtype, &self.begun));
                    self.begun.clear();
                }
            }
            self.add(tensor.source, not_finite(tensor.dtype, part));
            self.begun.extend_from_slice(part.get(part.len() / size * size..).unwrap_or_default());
        }
    }

    /// Adds values of a tensor.
    pub fn add(&mut self, source: usize, count: u64) {
        if count > 0 {
            *self.found.entry(source).or_default() += count;
        }
    }

    /// How many of each tensor, by the tensor's place in the source.
    pub fn found(self) -> BTreeMap<usize, u64> {
        self.found
    }
}

#[cfg(test)]
mod tests {
    use mqadapt_checkpoint::StoredType;
    use mqadapt_core::DType;

    use super::FiniteScan;
    use crate::layout::{Operation, OutputTensor};

    #[test]
    fn however_the_bytes_are_cut() {
        let nan = f32::NAN.to_le_bytes();
        let mut bytes = vec![0u8; 3]; // of a tensor of bytes
        for value in [[0; 4], nan, 1f32.to_le_bytes(), f32::INFINITY.to_le_bytes()] {
            bytes.extend(value);
        }
        bytes.extend([0x80, 0x7f, 0x80, 0xff, 0x00, 0x3f]); // bf16: inf, -inf, 0.5
        let tensor = |source, dtype, offset, bytes| OutputTensor {
            source,
            name: String::new(),
            shape: Vec::new(),
            stored_shape: None,
            dtype,
            offset,
            bytes,
            operation: Operation::Copy,
        };
        let tensors = [
            tensor(0, StoredType::Other(safetensors::Dtype::U8), 8, 3),
            tensor(1, StoredType::Float(DType::F32), 11, 16),
            tensor(2, StoredType::Float(DType::BF16), 27, 6),
        ];
        for size in 1..=bytes.len() {
            let mut scan = FiniteScan::default();
            for (number, piece) in bytes.chunks(size).enumerate() {
                scan.look(&tensors, 8 + (number * size) as u64, piece);
            }
            assert_eq!(scan.found().into_iter().collect::<Vec<_>>(), [(1, 2), (2, 2)], "pieces of {size}");
        }
    }
}
