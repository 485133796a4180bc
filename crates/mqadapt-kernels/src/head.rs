//! The output head for scoring: log-sum-exp, argmax and target logits of each row, without a buffer of logits.
//!
//! The vocabulary is cut into tiles whose bounds depend on nothing but its size; each thread turns tiles of logits into a
//! few numbers per row, which are combined in the order of the tiles.

mod divergence;

pub use divergence::DivergenceHead;

use crate::{
    Cpu, Precision, Store, WeightsRef,
    activation::softcap,
    matmul::{Operand, Target, Tile},
    pool::Parts,
    scratch,
    simd::{Simd, kernel},
};

/// What scoring needs to know of one row's logits.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct RowScore {
    /// `ln(sum(e^logit))` over the vocabulary; a target's log-probability is its logit less this.
    pub log_sum_exp: f32,
    /// The largest logit.
    pub max_logit: f32,
    /// Its token, the first of equals.
    pub argmax: u32,
}

/// The output head and the targets of [`Cpu::score_head`].
#[derive(Debug, Clone, Copy)]
pub struct ScoreHead<'a> {
    /// Weights `[vocab_size, hidden_size]`; the embedding where they are tied.
    pub lm_head: WeightsRef<'a>,
    /// Width of a hidden state.
    pub hidden_size: usize,
    /// `cap * tanh(logit / cap)` on logits (Gemma 2).
    pub softcap: Option<f32>,
    /// How hidden states enter the product.
    pub precision: Precision,
    /// Token ids whose logits are wanted, row after row.
    pub targets: &'a [u32],
    /// Row `i` wants `targets[target_starts[i]..target_starts[i + 1]]`; one more than there are rows.
    pub target_starts: &'a [usize],
}

/// Most rows that a tile of weights is multiplied with before the next comes from memory.
const BLOCK: usize = 1024;
/// Rows and tokens whose logits exist at a time, and tokens of a task.
const ROWS: usize = 96;
const TILE: usize = 128;
const TOKENS: usize = 2048;

/// Running result of a row over some tokens: the largest logit, its token, and `sum(e^(logit - largest))`.
const PART: usize = 3;

impl Cpu {
    /// Scores `hidden`, `[rows, hidden_size]` (after the final norm): one [`RowScore`] a row in `scores`, and
    /// the logit of every target in `target_logits`.
    ///
    /// # Panics
    /// If a shape does not fit or a target is no row of `lm_head`.
    pub fn score_head(&self, head: &ScoreHead<'_>, hidden: &[f32], scores: &mut [RowScore], target_logits: &mut [f32]) {
        let (k, rows) = (head.hidden_size, scores.len());
        let vocab = head.lm_head.rows(k);
        assert_eq!(hidden.len(), rows * k, "hidden is [{rows}, {k}]");
        assert!(vocab > 0 && u32::try_from(vocab).is_ok(), "the vocabulary has tokens");
        assert_eq!(head.target_starts.len(), rows + 1, "target_starts has a start for each row, and the end");
        assert!(
            head.target_starts.is_sorted() && head.target_starts.last() <= Some(&head.targets.len()),
            "target_starts"
        );
        assert_eq!(target_logits.len(), head.targets.len(), "a logit for each target");
        assert!(head.targets.iter().all(|&target| (target as usize) < vocab), "targets are below {vocab}");
        let logits = Parts::new(target_logits);
        for (block, scores) in scores.chunks_mut(BLOCK).enumerate() {
            let first = block * BLOCK;
            let starts = &head.target_starts[first..=first + scores.len()];
            self.score_block(head, &hidden[first * k..][..scores.len() * k], starts, scores, logits);
        }
    }

    /// Scores at most `BLOCK` rows.
    fn score_block(
        &self,
        head: &ScoreHead<'_>,
        hidden: &[f32],
        starts: &[usize],
        scores: &mut [RowScore],
        target_logits: Parts<'_, f32>,
    ) {
        let (k, rows) = (head.hidden_size, scores.len());
        let vocab = head.lm_head.rows(k);
        let tasks = vocab.div_ceil(TOKENS);
        let area = rows.min(ROWS) * TILE;
        Operand::prepare(self, hidden, rows, k, head.precision, &[head.lm_head].into_iter(), |operand| {
            scratch::with(area * self.threads(), |buffer: &mut [f32]| {
                scratch::with(tasks * rows * PART, |parts: &mut [f32]| {
                    let (buffer, shared) = (Parts::new(buffer), Parts::new(&mut *parts));
                    self.pool.run(tasks, |task, worker| {
                        // SAFETY: each worker has its own buffer, each task its own part.
                        let (logits, part) =
                            unsafe { (buffer.part(worker * area, area), shared.part(task * rows * PART, rows * PART)) };
                        part.chunks_exact_mut(PART)
                            .for_each(|part| part.copy_from_slice(&[f32::NEG_INFINITY, 0.0, 0.0]));
                        let end = vocab.min((task + 1) * TOKENS);
                        for column in (task * TOKENS..end).step_by(TILE) {
                            let columns = TILE.min(end - column);
                            for row in (0..rows).step_by(ROWS) {
                                let rows = ROWS.min(rows - row);
                                let tile = Tile { row, rows, column, columns };
                                let target =
                                    Target { start: logits.as_mut_ptr(), stride: columns, store: Store::Overwrite };
                                // SAFETY: shapes were checked; the buffer holds the tile.
                                unsafe { operand.multiply(self.isa, &head.lm_head.into(), tile, target) };
                                let logits = &mut logits[..rows * columns];
                                if let Some(cap) = head.softcap {
                                    softcap(self.isa, logits, cap);
                                }
                                for (row, logits) in (row..).zip(logits.chunks_exact(columns)) {
                                    for index in starts[row]..starts[row + 1] {
                                        if let Some(&logit) =
                                            logits.get((head.targets[index] as usize).wrapping_sub(column))
                                        {
                                            // SAFETY: a target has one row and lies in one tile.
                                            unsafe { target_logits.part(index, 1)[0] = logit };
                                        }
                                    }
                                    let part = &mut part[row * PART..][..PART];
                                    // SAFETY: slices; a `Cpu` holds only an available `isa`.
                                    unsafe { take_in(self.isa, logits, column, part) };
                                }
                            }
                        }
                    });
                    for (row, score) in scores.iter_mut().enumerate() {
                        *score = combine((0..tasks).map(|task| &parts[(task * rows + row) * PART..][..PART]));
                    }
                });
            });
        });
    }
}

/// Combines a row's parts, in the order of their tokens.
fn combine<'p>(parts: impl Iterator<Item = &'p [f32]>) -> RowScore {
    let (mut largest, mut argmax, mut sum) = (f32::NEG_INFINITY, 0, 0f64);
    for part in parts {
        let (top, token, part_sum) = (part[0], part[1].to_bits(), f64::from(part[2]));
        if top > largest {
            sum = sum * f64::from(largest - top).exp() + part_sum;
            (largest, argmax) = (top, token);
        } else {
            sum += part_sum * f64::from(top - largest).exp();
        }
    }
    let log_sum_exp = (f64::from(largest) + sum.ln()) as f32;
    RowScore { log_sum_exp, max_logit: largest, argmax }
}

kernel! { fn take_in = take_in_body(logits: &[f32], first_token: usize, part: &mut [f32]) }

/// Brings a row's running result up to date with some logits, the first of which is of `first_token`.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
unsafe fn take_in_body<S: Simd>(logits: &[f32], first_token: usize, part: &mut [f32]) {
    let n = logits.len();
    let whole = n - n % S::LANES;
    // SAFETY: all vectors lie within the slice.
    unsafe {
        let from = logits.as_ptr();
        let mut top = S::splat(f32::NEG_INFINITY);
        for i in (0..whole).step_by(S::LANES) {
            top = S::max(top, S::load(from.add(i)));
        }
        let mut top = S::max_lane(top);
        for &logit in &logits[whole..] {
            top = if logit > top { logit } else { top };
        }
        let mut largest = part[0];
        if top > largest {
            let shrink = S::max_lane(S::exp(S::splat(largest - top)));
            let index = logits.iter().position(|&logit| logit == top).unwrap_or(0);
            part.copy_from_slice(&[top, f32::from_bits((first_token + index) as u32), part[2] * shrink]);
            largest = top;
        }
        let mut sum = S::zero();
        for i in (0..whole).step_by(S::LANES) {
            sum = S::add(sum, S::exp(S::sub(S::load(from.add(i)), S::splat(largest))));
        }
        let mut sum = S::sum(sum);
        for &logit in &logits[whole..] {
            sum += S::max_lane(S::exp(S::splat(logit - largest)));
        }
        part[2] += sum;
    }
}

#[cfg(test)]
mod tests;
