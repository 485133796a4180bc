//! Products of activations `[m, k]` with weights `[n, k]`, both contiguous along `k`: nothing is packed.
//!
//! A tile of a few rows by four columns stays in registers while `k` runs; each output element has one vector of
//! partial sums, whatever the tile, so its bits do not depend on `m`, on blocking or on threads.

use crate::{Activation, Cpu, Precision, WeightsRef, pool::Parts, scratch, weights::Linear};
pub(crate) use operand::Operand;

mod digits;
mod float;
mod int8;
mod operand;
mod quantised;
mod tile;
#[cfg(target_arch = "x86_64")]
mod vdpbf16;
#[cfg(target_arch = "x86_64")]
mod vnni;

#[cfg(test)]
mod tests;

/// What happens to the content of an output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Store {
    /// It is replaced.
    Overwrite,
    /// The result is added to it, as to a residual stream.
    Accumulate,
}

/// One product of a call: a linear layer, and where its output goes.
#[derive(Debug)]
pub struct MatmulOut<'a> {
    /// Weights `[n, k]` and bias `[n]`.
    pub linear: Linear<'a>,
    /// Output `[m, n]`.
    pub out: &'a mut [f32],
}

impl<'a> MatmulOut<'a> {
    /// The product with `linear` (or bare weights) into `out`.
    pub fn new(linear: impl Into<Linear<'a>>, out: &'a mut [f32]) -> Self {
        Self { linear: linear.into(), out }
    }
}

impl Cpu {
    /// `out = x · weight^T (+ bias)` for every product, in one parallel region: q, k and v share their `x`.
    ///
    /// `x` is `[m, k]`, every `weight` `[n, k]`, every `out` `[m, n]`; sums are `f32`. A row of the result
    /// depends neither on `m` nor on the other rows.
    ///
    /// # Panics
    /// If a shape does not fit.
    pub fn matmul_nt(
        &self,
        x: &[f32],
        m: usize,
        k: usize,
        products: &mut [MatmulOut<'_>],
        precision: Precision,
        store: Store,
    ) {
        assert_eq!(x.len(), m * k, "x is [{m}, {k}]");
        for product in &*products {
            let n = product.linear.rows(k);
            assert_eq!(product.out.len(), m * n, "out is [{m}, {n}]");
        }
        if m == 0 {
            return;
        }
        let weights = products.iter().map(|product| product.linear.weight);
        Operand::prepare(self, x, m, k, precision, &weights, |operand| {
            let grids = || products.iter().map(|product| Grid::new(m, product.linear.rows(k), &product.linear.weight));
            let tasks = grids().map(|grid| grid.tasks()).sum();
            let products: &[MatmulOut<'_>] = products;
            self.pool.run(tasks, |mut task, _| {
                for (product, grid) in products.iter().zip(grids()) {
                    if task < grid.tasks() {
                        let tile = grid.tile(task);
                        let out = Target {
                            // SAFETY: tiles are disjoint, and `products` is borrowed mutably by this call.
                            start: unsafe { product.out.as_ptr().cast_mut().add(tile.row * grid.n + tile.column) },
                            stride: grid.n,
                            store,
                        };
                        // SAFETY: shapes were checked; the tile lies within `out`, and no other task writes it.
                        unsafe { operand.multiply(self.isa, &product.linear, tile, out) };
                        return;
                    }
                    task -= grid.tasks();
                }
            });
        });
    }

    /// `out = activation(x · gate^T) * (x · up^T)`: the first half of a gated MLP in one parallel region.
    ///
    /// `x` is `[m, k]`, `gate` and `up` are `[n, k]`, `out` is `[m, n]`.
    ///
    /// # Panics
    /// If a shape does not fit.
    #[allow(clippy::too_many_arguments)] // the operands of one formula
    pub fn matmul_nt_gated(
        &self,
        x: &[f32],
        m: usize,
        k: usize,
        gate: Linear<'_>,
        up: Linear<'_>,
        activation: Activation,
        out: &mut [f32],
        precision: Precision,
    ) {
        let n = gate.rows(k);
        assert_eq!(x.len(), m * k, "x is [{m}, {k}]");
        assert_eq!(up.rows(k), n, "gate and up have as many rows");
        assert_eq!(out.len(), m * n, "out is [{m}, {n}]");
        if m == 0 {
            return;
        }
        Operand::prepare(self, x, m, k, precision, &[gate.weight, up.weight].into_iter(), |operand| {
            let grid = Grid::new(m, n, &gate.weight);
            let out = Parts::new(out);
            let area = grid.row_step * grid.column_step;
            scratch::with(2 * area * self.threads(), |buffer: &mut [f32]| {
                let buffer = Parts::new(buffer);
                self.pool.run(grid.tasks(), |task, worker| {
                    let tile = grid.tile(task);
                    // SAFETY: each worker has its own part of the buffer.
                    let (gates, ups) = unsafe { buffer.part(worker * 2 * area, 2 * area) }.split_at_mut(area);
                    for (linear, values) in [(&gate, &mut *gates), (&up, &mut *ups)] {
                        let target =
                            Target { start: values.as_mut_ptr(), stride: tile.columns, store: Store::Overwrite };
                        // SAFETY: shapes were checked; a tile has at most `area` elements.
                        unsafe { operand.multiply(self.isa, linear, tile, target) };
                    }
                    for row in 0..tile.rows {
                        let from = row * tile.columns..(row + 1) * tile.columns;
                        // SAFETY: tiles are disjoint.
                        let to = unsafe { out.part((tile.row + row) * n + tile.column, tile.columns) };
                        activation.gate(self.isa, &gates[from.clone()], &ups[from], to);
                    }
                });
            });
        });
    }
}

/// Where a tile is written.
#[derive(Clone, Copy)]
pub(crate) struct Target {
    pub(crate) start: *mut f32,
    /// Elements from one row to the next.
    pub(crate) stride: usize,
    pub(crate) store: Store,
}

/// A rectangle of the output.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    pub(crate) row: usize,
    pub(crate) rows: usize,
    pub(crate) column: usize,
    pub(crate) columns: usize,
}

/// How an output `[m, n]` is cut into tasks. Results do not depend on it.
struct Grid {
    m: usize,
    n: usize,
    row_step: usize,
    column_step: usize,
}

impl Grid {
    fn new(m: usize, n: usize, weight: &WeightsRef<'_>) -> Self {
        /// Rows of a task: a multiple of every `Simd::TILE_ROWS`.
        const ROWS: usize = 96;
        /// Columns of a task with many rows: with those rows, their blocks of `k` stay in the second cache.
        const COLUMNS: usize = 128;
        /// Bytes of weights in a task with few rows: enough to pay for the claim.
        const BYTES: usize = 64 << 10;
        let row_bytes = weight.bytes().div_ceil(n.max(1)).max(1);
        let column_step = match m {
            0..16 => (BYTES / row_bytes).next_multiple_of(4).clamp(4, 512),
            // Rows a multiple of 4 KB apart share few sets of the cache: their blocks fill it sooner.
            _ if row_bytes.is_multiple_of(4096) => ((512 << 10) / row_bytes).clamp(16, COLUMNS),
            _ => COLUMNS,
        };
        let column_step = column_step.min(n.max(1));
        Self { m, n, row_step: ROWS.min(m), column_step }
    }

    fn tasks(&self) -> usize {
        self.m.div_ceil(self.row_step) * self.n.div_ceil(self.column_step)
    }

    /// Row blocks of one column block follow each other, so that the weights are still in a cache.
    fn tile(&self, task: usize) -> Tile {
        let down = self.m.div_ceil(self.row_step);
        let (row, column) = (task % down * self.row_step, task / down * self.column_step);
        Tile { row, rows: self.row_step.min(self.m - row), column, columns: self.column_step.min(self.n - column) }
    }
}

impl Cpu {
    /// Calls `task` with every row of `from`, `[rows, k]`, and its place in `to`, rows `stride` apart.
    fn each_row<T: Send>(
        &self,
        from: &[f32],
        k: usize,
        to: &mut [T],
        stride: usize,
        task: impl Fn(&[f32], &mut [T]) + Sync,
    ) {
        let parts = Parts::new(to);
        self.by_rows(from.len() / k, k, |first, rows| {
            for row in first..first + rows {
                // SAFETY: rows are disjoint.
                task(&from[row * k..][..k], unsafe { parts.part(row * stride, stride) });
            }
        });
    }
}

impl Target {
    /// The same place, to be added to.
    fn accumulating(self) -> Self {
        Self { store: Store::Accumulate, ..self }
    }

    /// Writes one sum.
    ///
    /// # Safety
    /// It lies within the target, and `bias` within the tile.
    #[inline(always)]
    unsafe fn put(self, row: usize, column: usize, sum: f32, bias: Option<&[f32]>) {
        // SAFETY: the caller's promise.
        unsafe {
            let sum = bias.map_or(sum, |bias| sum + bias.get_unchecked(column));
            let to = self.start.add(row * self.stride + column);
            *to = if self.store == Store::Accumulate { *to + sum } else { sum };
        }
    }

    /// Writes four sums, in one vector.
    ///
    /// # Safety
    /// They lie within the target, and `bias` within the tile.
    #[inline(always)]
    unsafe fn put4(self, row: usize, column: usize, mut sums: [f32; 4], bias: Option<&[f32]>) {
        // SAFETY: the caller's promise; an array of floats is aligned as they are.
        unsafe {
            if let Some(bias) = bias {
                let bias = *bias.as_ptr().add(column).cast::<[f32; 4]>();
                for c in 0..4 {
                    sums[c] += bias[c];
                }
            }
            let to = self.start.add(row * self.stride + column).cast::<[f32; 4]>();
            if self.store == Store::Accumulate {
                let old = *to;
                for c in 0..4 {
                    sums[c] += old[c];
                }
            }
            *to = sums;
        }
    }
}
