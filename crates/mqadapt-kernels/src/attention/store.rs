//! Writing new K or V rows into a cache, rounded to its dtype.

use super::KvMut;
use crate::{Cpu, FloatsMut, convert, pool::Parts};

impl Cpu {
    /// Stores `src`, `[rows, num_key_value_heads, head_dim]`, at cache positions `start..start + rows`.
    ///
    /// # Panics
    /// If a shape does not fit or a row lies outside of the cache.
    pub fn store_kv(&self, src: &[f32], num_key_value_heads: usize, to: &mut KvMut<'_>, start: usize) {
        let KvMut { ref mut data, head_stride, row_stride, head_dim } = *to;
        let row_len = num_key_value_heads * head_dim;
        assert!(row_len > 0 && src.len().is_multiple_of(row_len), "src is [rows, {num_key_value_heads}, {head_dim}]");
        assert!(row_stride >= head_dim || src.len() == row_len, "cache rows do not overlap");
        let at = |row: usize, head: usize| (start + row) * row_stride + head * head_stride;
        macro_rules! copy {
            ($data:expr, $round:expr) => {{
                let parts = Parts::new(&mut **$data);
                self.by_rows(src.len() / row_len, row_len, |first, rows| {
                    for row in first..first + rows {
                        for (head, from) in src[row * row_len..][..row_len].chunks_exact(head_dim).enumerate() {
                            // SAFETY: rows and heads are disjoint.
                            $round(from, unsafe { parts.part(at(row, head), head_dim) });
                        }
                    }
                });
            }};
        }
        match data {
            FloatsMut::F32(data) => copy!(data, |from: &[f32], to: &mut [f32]| to.copy_from_slice(from)),
            FloatsMut::F16(data) => copy!(data, |from, to| _ = convert::f16_from_f32(self.isa, from, to)),
            FloatsMut::Bf16(data) => copy!(data, |from, to| _ = convert::bf16_from_f32(self.isa, from, to)),
        }
    }
}
