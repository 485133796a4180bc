//! Rotary position embedding.

use crate::{
    Cpu,
    pool::Parts,
    simd::{Simd, kernel},
};

/// Tables of a rotary embedding, shared by all heads.
#[derive(Debug, Clone, Copy)]
pub struct RopeTables<'a> {
    /// Cosines `[max_position, rotary_dim / 2]`.
    pub cos: &'a [f32],
    /// Sines `[max_position, rotary_dim / 2]`.
    pub sin: &'a [f32],
    /// Leading dimensions of each head that turn; even, at most `head_dim`.
    pub rotary_dim: usize,
}

impl Cpu {
    /// Rotates `x`, `[rows, heads, head_dim]`, in place: dimension `j` with `j + rotary_dim / 2` by the angle of its
    /// row's position (HF `rotate_half`). Dimensions from `rotary_dim` on stay.
    ///
    /// # Panics
    /// If a shape does not fit or a position lies behind the tables.
    pub fn rope(&self, x: &mut [f32], heads: usize, head_dim: usize, positions: &[u32], tables: RopeTables<'_>) {
        let half = tables.rotary_dim / 2;
        let row_len = heads * head_dim;
        assert_eq!(x.len(), positions.len() * row_len, "x is [{}, {heads}, {head_dim}]", positions.len());
        assert!(
            tables.rotary_dim.is_multiple_of(2) && tables.rotary_dim <= head_dim,
            "rotary_dim is even and within head_dim"
        );
        assert_eq!(tables.cos.len(), tables.sin.len(), "cos and sin are equally long");
        let parts = Parts::new(x);
        self.by_rows(positions.len(), row_len, |first, rows| {
            for row in first..first + rows {
                let at = positions[row] as usize * half;
                let (cos, sin) = (&tables.cos[at..][..half], &tables.sin[at..][..half]);
                // SAFETY: rows are disjoint.
                let x = unsafe { parts.part(row * row_len, row_len) };
                for head in x.chunks_exact_mut(head_dim) {
                    // SAFETY: a head has `2 * half` values or more; a `Cpu` holds only an available `isa`.
                    unsafe { turn(self.isa, head.as_mut_ptr(), cos.as_ptr(), sin.as_ptr(), half) };
                }
            }
        });
    }
}

kernel! {
    fn turn = turn_body(x: *mut f32, cos: *const f32, sin: *const f32, half: usize)
}

/// # Safety
/// `x` has `2 * half` values, `cos` and `sin` have `half`.
#[inline(always)]
unsafe fn turn_body<S: Simd>(x: *mut f32, cos: *const f32, sin: *const f32, half: usize) {
    let mut i = 0;
    while i < half {
        let n = half - i;
        // SAFETY: reads and writes lanes below `half` of each half.
        unsafe {
            let (low, high) = (x.add(i), x.add(half + i));
            let (a, b) = (S::load_some(low, n), S::load_some(high, n));
            let (c, s) = (S::load_some(cos.add(i), n), S::load_some(sin.add(i), n));
            S::store_some(low, n, S::sub(S::mul(a, c), S::mul(b, s)));
            S::store_some(high, n, S::fma(a, s, S::mul(b, c)));
        }
        i += S::LANES;
    }
}

#[cfg(test)]
mod tests {
    use super::RopeTables;
    use crate::testing::{close, cpus, random};

    #[test]
    fn turns_pairs_by_position() {
        for (heads, head_dim, rotary_dim) in [(3, 64, 64), (2, 80, 20), (1, 6, 6), (4, 8, 2)] {
            let (half, most) = (rotary_dim / 2, 50);
            let angles: Vec<f32> = random(1, most * half);
            let (cos, sin): (Vec<_>, Vec<_>) = angles.iter().map(|angle| (angle.cos(), angle.sin())).unzip();
            let positions = [7, 0, 49, 7];
            let x = random(2, positions.len() * heads * head_dim);
            let mut expected: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
            for (row, &position) in positions.iter().enumerate() {
                for head in 0..heads {
                    for j in 0..half {
                        let low = (row * heads + head) * head_dim + j;
                        let angle = f64::from(angles[position as usize * half + j]);
                        let (a, b) = (expected[low], expected[low + half]);
                        expected[low] = a * angle.cos() - b * angle.sin();
                        expected[low + half] = b * angle.cos() + a * angle.sin();
                    }
                }
            }
            for cpu in cpus() {
                let mut out = x.clone();
                cpu.rope(&mut out, heads, head_dim, &positions, RopeTables { cos: &cos, sin: &sin, rotary_dim });
                close(&format!("{cpu:?} {head_dim}"), &out, &expected, 3e-7);
            }
        }
    }

    #[test]
    #[should_panic(expected = "out of range")]
    fn a_position_behind_the_tables_panics() {
        let tables = RopeTables { cos: &[1.0], sin: &[0.0], rotary_dim: 2 };
        cpus()[0].rope(&mut [1.0; 2], 1, 2, &[1], tables);
    }
}
