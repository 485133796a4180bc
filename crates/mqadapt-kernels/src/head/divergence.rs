//! Divergences of next-token distributions, without a buffer of logits: tiles of the vocabulary, as for scores.
//!
//! With `p` and `q` logits, `KL = sum e^p (p - q) / sum e^p - ln(sum e^p) + ln(sum e^q)`. The tile of `p` and its
//! exponentials serve for every model that is compared.

use crate::{
    Cpu, Precision, Store, WeightsRef,
    activation::softcap,
    matmul::{Operand, Target, Tile},
    pool::Parts,
    scratch,
    simd::{Simd, kernel},
};

use super::{ROWS, TILE, TOKENS};

/// The output head of [`Cpu::divergence_head`].
#[derive(Debug, Clone, Copy)]
pub struct DivergenceHead<'a> {
    /// Weights `[vocab_size, hidden_size]`; the embedding where they are tied.
    pub lm_head: WeightsRef<'a>,
    /// Width of a hidden state.
    pub hidden_size: usize,
    /// `cap * tanh(logit / cap)` on logits (Gemma 2).
    pub softcap: Option<f32>,
    /// How hidden states enter the product.
    pub precision: Precision,
}

/// Running result of a reference's row: the largest logit `p`, `sum(e^(p - largest))`.
const REFERENCE: usize = 2;
/// Of a compared row: the largest logit `q`, `sum(e^(q - largest))`, `sum(e^(p - largest p) (p - q))`.
const COMPARED: usize = 3;

impl Cpu {
    /// `KL(reference | other)` in nats, row by row.
    ///
    /// `hidden`, `[1 + others, rows, hidden_size]`: hidden states after the final norm, first those of the reference.
    /// `out`, `[others, rows]`. A row's result depends neither on other rows nor on other models.
    ///
    /// # Panics
    /// If a shape does not fit.
    pub fn divergence_head(&self, head: &DivergenceHead<'_>, hidden: &[f32], rows: usize, out: &mut [f64]) {
        let k = head.hidden_size;
        let vocab = head.lm_head.rows(k);
        assert!(vocab > 0, "the vocabulary has tokens");
        if rows == 0 {
            assert!(hidden.is_empty() && out.is_empty(), "rows");
            return;
        }
        assert!(out.len().is_multiple_of(rows), "out is [others, {rows}]");
        let others = out.len() / rows;
        assert_eq!(hidden.len(), (1 + others) * rows * k, "hidden is [{}, {rows}, {k}]", 1 + others);
        Operand::prepare(
            self,
            hidden,
            (1 + others) * rows,
            k,
            head.precision,
            &[head.lm_head].into_iter(),
            |operand| {
                for first in (0..rows).step_by(ROWS) {
                    let block = VocabularyTile { first, len: ROWS.min(rows - first), rows, others, vocab };
                    self.divergence_block(head, operand, block, out);
                }
            },
        );
    }

    /// Compares a block of rows.
    fn divergence_block(
        &self,
        head: &DivergenceHead<'_>,
        operand: &Operand<'_>,
        block: VocabularyTile,
        out: &mut [f64],
    ) {
        let VocabularyTile { len, others, vocab, .. } = block;
        let (tasks, part, area) = (vocab.div_ceil(TOKENS), block.part(), len * TILE);
        let room = 3 * area + len;
        scratch::with(room * self.threads(), |buffer: &mut [f32]| {
            scratch::with(tasks * len * part, |parts: &mut [f32]| {
                let (buffer, shared) = (Parts::new(buffer), Parts::new(&mut *parts));
                self.pool.run(tasks, |task, worker| {
                    // SAFETY: each worker has its own buffer, each task its own parts.
                    let (buffer, parts) =
                        unsafe { (buffer.part(worker * room, room), shared.part(task * len * part, len * part)) };
                    parts.fill(0.0);
                    for row in parts.chunks_exact_mut(part) {
                        row[0] = f32::NEG_INFINITY;
                        row[REFERENCE..].iter_mut().step_by(COMPARED).for_each(|top| *top = f32::NEG_INFINITY);
                    }
                    let (shrinks, buffer) = buffer.split_at_mut(len);
                    let (p, buffer) = buffer.split_at_mut(area);
                    let (weights, q) = buffer.split_at_mut(area);
                    let end = vocab.min((task + 1) * TOKENS);
                    for column in (task * TOKENS..end).step_by(TILE) {
                        let columns = TILE.min(end - column);
                        let multiply = |model: usize, logits: &mut [f32]| {
                            let tile = Tile { row: model * block.rows + block.first, rows: len, column, columns };
                            let target =
                                Target { start: logits.as_mut_ptr(), stride: columns, store: Store::Overwrite };
                            // SAFETY: shapes were checked; the buffer holds the tile.
                            unsafe { operand.multiply(self.isa, &head.lm_head.into(), tile, target) };
                            if let Some(cap) = head.softcap {
                                softcap(self.isa, &mut logits[..len * columns], cap);
                            }
                        };
                        multiply(0, p);
                        for row in 0..len {
                            let at = row * columns..(row + 1) * columns;
                            let part = &mut parts[row * part..][..REFERENCE];
                            // SAFETY: slices of equal length; a `Cpu` holds only an available `isa`.
                            unsafe { weigh(self.isa, &p[at.clone()], &mut weights[at], part, &mut shrinks[row]) };
                        }
                        for other in 0..others {
                            multiply(1 + other, q);
                            for row in 0..len {
                                let at = row * columns..(row + 1) * columns;
                                let part = &mut parts[row * part + REFERENCE + other * COMPARED..][..COMPARED];
                                part[2] *= shrinks[row];
                                // SAFETY: as above.
                                unsafe { compare(self.isa, &p[at.clone()], &weights[at.clone()], &q[at], part) };
                            }
                        }
                    }
                });
                for row in 0..len {
                    let of = |task: usize| &parts[(task * len + row) * part..][..part];
                    for other in 0..others {
                        out[other * block.rows + block.first + row] = combine((0..tasks).map(|task| {
                            let part = of(task);
                            (&part[..REFERENCE], &part[REFERENCE + other * COMPARED..][..COMPARED])
                        }));
                    }
                }
            });
        });
    }
}

/// Rows that are compared at a time.
#[derive(Clone, Copy)]
struct VocabularyTile {
    first: usize,
    len: usize,
    /// Rows of each model.
    rows: usize,
    others: usize,
    vocab: usize,
}

impl VocabularyTile {
    /// Values of a row's running result.
    fn part(&self) -> usize {
        REFERENCE + self.others * COMPARED
    }
}

/// Combines a row's parts, in the order of their tokens.
fn combine<'p>(parts: impl Iterator<Item = (&'p [f32], &'p [f32])> + Clone) -> f64 {
    let largest = |at: fn((&'p [f32], &'p [f32])) -> f32| {
        f64::from(parts.clone().map(at).fold(f32::NEG_INFINITY, |top, value| if value > top { value } else { top }))
    };
    let (p_top, q_top) = (largest(|(p, _)| p[0]), largest(|(_, q)| q[0]));
    let (mut p_sum, mut q_sum, mut difference) = (0f64, 0f64, 0f64);
    for (p, q) in parts {
        let p_scale = (f64::from(p[0]) - p_top).exp();
        p_sum += f64::from(p[1]) * p_scale;
        q_sum += f64::from(q[1]) * (f64::from(q[0]) - q_top).exp();
        difference += f64::from(q[2]) * p_scale;
    }
    difference / p_sum - (p_top + p_sum.ln()) + (q_top + q_sum.ln())
}

kernel! { fn weigh = weigh_body(p: &[f32], weights: &mut [f32], part: &mut [f32], shrink: &mut f32) }
kernel! { fn compare = compare_body(p: &[f32], weights: &[f32], q: &[f32], part: &mut [f32]) }

/// The largest of some logits and of what came before.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
unsafe fn largest<S: Simd>(logits: &[f32], before: f32) -> f32 {
    let whole = logits.len() - logits.len() % S::LANES;
    // SAFETY: all vectors lie within the slice.
    unsafe {
        let mut top = S::splat(f32::NEG_INFINITY);
        for i in (0..whole).step_by(S::LANES) {
            top = S::max(top, S::load(logits.as_ptr().add(i)));
        }
        let top = S::max_lane(top);
        let larger = |top: f32, logit: f32| if logit > top { logit } else { top };
        logits[whole..].iter().copied().fold(larger(before, top), larger)
    }
}

/// Exponentials of some logits of the reference, and its running result; `shrink` is what earlier sums are worth now.
///
/// # Safety
/// As for [`Simd`]; `weights` is as long as `p`.
#[inline(always)]
unsafe fn weigh_body<S: Simd>(p: &[f32], weights: &mut [f32], part: &mut [f32], shrink: &mut f32) {
    let whole = p.len() - p.len() % S::LANES;
    // SAFETY: all vectors lie within the slices.
    unsafe {
        let top = largest::<S>(p, part[0]);
        *shrink = if top > part[0] { S::max_lane(S::exp(S::splat(part[0] - top))) } else { 1.0 };
        let (mut sum, offset) = (S::zero(), S::splat(top));
        for i in (0..whole).step_by(S::LANES) {
            let weight = S::exp(S::sub(S::load(p.as_ptr().add(i)), offset));
            S::store(weights.as_mut_ptr().add(i), weight);
            sum = S::add(sum, weight);
        }
        let mut sum = S::sum(sum);
        for i in whole..p.len() {
            weights[i] = S::max_lane(S::exp(S::splat(p[i] - top)));
            sum += weights[i];
        }
        part[0] = top;
        part[1] = part[1] * *shrink + sum;
    }
}

/// Brings a compared row's running result up to date with some logits.
///
/// # Safety
/// As for [`Simd`]; the slices of logits are of equal length.
#[inline(always)]
unsafe fn compare_body<S: Simd>(p: &[f32], weights: &[f32], q: &[f32], part: &mut [f32]) {
    let whole = q.len() - q.len() % S::LANES;
    // SAFETY: all vectors lie within the slices.
    unsafe {
        let top = largest::<S>(q, part[0]);
        let shrink = if top > part[0] { S::max_lane(S::exp(S::splat(part[0] - top))) } else { 1.0 };
        let (mut sum, mut difference, offset) = (S::zero(), S::zero(), S::splat(top));
        for i in (0..whole).step_by(S::LANES) {
            let own = S::load(q.as_ptr().add(i));
            sum = S::add(sum, S::exp(S::sub(own, offset)));
            let apart = S::sub(S::load(p.as_ptr().add(i)), own);
            difference = S::fma(S::load(weights.as_ptr().add(i)), apart, difference);
        }
        let (mut sum, mut difference) = (S::sum(sum), S::sum(difference));
        for i in whole..q.len() {
            sum += S::max_lane(S::exp(S::splat(q[i] - top)));
            difference += weights[i] * (p[i] - q[i]);
        }
        part[0] = top;
        part[1] = part[1] * shrink + sum;
        part[2] += difference;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Stored, cpus, random};
    use half::bf16;

    /// Against sums in f64 over all logits; any number of rows, models and tokens.
    #[test]
    fn divergences_equal_those_of_all_logits() {
        for (rows, others, vocab, k, softcap) in
            [(1, 1, 5000, 40, None), (130, 3, 2051, 24, Some(2.0)), (7, 2, 3, 8, None)]
        {
            let hidden = random(1, (1 + others) * rows * k);
            let weights = Stored::random(2, vocab * k);
            for cpu in cpus() {
                for (lm_head, values) in weights.weights() {
                    for precision in [Precision::Exact, Precision::Fast] {
                        let round = precision == Precision::Fast && matches!(lm_head, WeightsRef::Bf16(_));
                        let x = |v: f32| if round { bf16::from_f32(v).to_f64() } else { f64::from(v) };
                        let head = DivergenceHead { lm_head, hidden_size: k, softcap, precision };
                        let mut out = vec![0.0; others * rows];
                        cpu.divergence_head(&head, &hidden, rows, &mut out);
                        let logprobs = |row: usize| -> Vec<f64> {
                            let hidden = &hidden[row * k..][..k];
                            let logits: Vec<f64> = values
                                .chunks_exact(k)
                                .map(|w| hidden.iter().zip(w).map(|(h, w)| x(*h) * w).sum::<f64>())
                                .map(|z| softcap.map(f64::from).map_or(z, |cap| cap * (z / cap).tanh()))
                                .collect();
                            let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                            let lse = top + logits.iter().map(|z| (z - top).exp()).sum::<f64>().ln();
                            logits.into_iter().map(|z| z - lse).collect()
                        };
                        for row in 0..rows {
                            let p = logprobs(row);
                            for other in 0..others {
                                let q = logprobs((1 + other) * rows + row);
                                let exact: f64 = p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum();
                                let found = out[other * rows + row];
                                assert!((found - exact).abs() < 1e-5 * exact.max(1.0), "{cpu:?} {found} {exact}");
                            }
                        }
                    }
                }
            }
        }
    }

    /// Rows do not depend on their company, and a model does not diverge from itself.
    #[test]
    fn rows_and_models_stand_alone() {
        let (rows, vocab, k) = (100, 3000, 16);
        let (a, b) = (random(1, rows * k), random(3, rows * k));
        let weights = Stored::random(2, vocab * k);
        for cpu in cpus() {
            let lm_head = WeightsRef::Bf16(&weights.bf16);
            let head = DivergenceHead { lm_head, hidden_size: k, softcap: None, precision: Precision::Fast };
            let run = |hidden: Vec<f32>, rows: usize| {
                let mut out = vec![0.0; hidden.len() / k - rows];
                cpu.divergence_head(&head, &hidden, rows, &mut out);
                out
            };
            let all = run([&a[..], &b, &a].concat(), rows);
            assert_eq!(run([&a[..], &b].concat(), rows), all[..rows]);
            assert!(all[rows..].iter().all(|own| own.abs() < 1e-9), "{cpu:?}");
            for row in [0, 50, 99] {
                let at = row * k..(row + 1) * k;
                assert_eq!(run([&a[at.clone()], &b[at]].concat(), 1), all[row..=row]);
            }
        }
    }

    #[test]
    fn nan_is_not_lost() {
        for cpu in cpus() {
            let lm_head = WeightsRef::F32(&[1.0, f32::NAN, 2.0]);
            let head = DivergenceHead { lm_head, hidden_size: 1, softcap: None, precision: Precision::Exact };
            let mut out = [0.0];
            cpu.divergence_head(&head, &[1.0, 2.0], 1, &mut out);
            assert!(out[0].is_nan());
        }
    }
}
