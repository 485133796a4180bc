//! Weights as 8-bit integers with a scale for every row: a choice of speed over exactness.

use std::thread;

use mqadapt_kernels::{Int8Weights, WeightsRef};

use crate::load::storage::{Floats, Lines};

/// The largest integer: symmetric, so that the negative of a weight has the negative integer.
const LARGEST: f32 = 127.0;

/// A matrix `[rows, columns]` of integers, `[rows]` scales beside it.
pub(crate) struct Int8 {
    values: Lines,
    scales: Vec<f32>,
    len: usize,
}

impl Int8 {
    /// Each row's largest weight becomes 127 or -127; the others are rounded to the nearest integer.
    pub(crate) fn new(floats: &Floats, columns: usize, threads: usize) -> Self {
        let len = floats.len();
        let rows = len / columns;
        let mut out = Self { values: Lines::zeros(len), scales: vec![0.0; rows], len };
        let share = rows.div_ceil(threads.max(1)).max(1); // rows of a thread
        let values = out.values.slice_mut::<i8>(len).chunks_mut(share * columns);
        let scales = out.scales.chunks_mut(share);
        thread::scope(|scope| {
            for (nth, (values, scales)) in values.zip(scales).enumerate() {
                scope.spawn(move || {
                    let mut row = vec![0.0; columns];
                    for (at, (values, scale)) in values.chunks_exact_mut(columns).zip(scales).enumerate() {
                        floats.read((nth * share + at) * columns, &mut row);
                        *scale = quantise(&row, values);
                    }
                });
            }
        });
        out
    }

    pub(crate) fn weights(&self) -> WeightsRef<'_> {
        WeightsRef::Int8(Int8Weights { values: self.values.slice(self.len), scales: &self.scales })
    }
}

/// Integers of a row; gives its scale.
fn quantise(row: &[f32], values: &mut [i8]) -> f32 {
    let largest = row.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let factor = if largest > 0.0 { LARGEST / largest } else { 0.0 };
    for (value, x) in values.iter_mut().zip(row) {
        *value = (x * factor).round() as i8;
    }
    largest / LARGEST
}

#[cfg(test)]
mod tests {
    use mqadapt_core::DType;

    use super::*;

    #[test]
    fn every_weight_is_half_a_step_away_at_most() {
        for (rows, columns) in [(1, 1), (3, 64), (7, 150), (5, 40)] {
            let source: Vec<f32> =
                (0..rows * columns).map(|i| ((i * 71 % 113) as f32 - 50.0) * (1 + i % 3) as f32).collect();
            let floats = Floats::from_f32(&source, DType::F32);
            let int8 = Int8::new(&floats, columns, 2);
            let WeightsRef::Int8(weights) = int8.weights() else { panic!() };
            for (i, x) in source.iter().enumerate() {
                let scale = weights.scales[i / columns];
                let back = f32::from(weights.values[i]) * scale;
                assert!((back - x).abs() <= scale * 0.501 && scale > 0.0, "{rows}x{columns} {i}: {x} {back}");
            }
        }
        let zeros = Int8::new(&Floats::zeros(64, DType::BF16), 64, 1);
        let WeightsRef::Int8(weights) = zeros.weights() else { panic!() };
        assert!(weights.values.iter().all(|v| *v == 0) && weights.scales == [0.0]);
    }
}
