//! Kullback-Leibler divergence of two rows of logits, in loops that the compiler turns into vector code.

use std::f32::consts::LOG2_E;

/// Values side by side, each with sums of its own.
const LANES: usize = 16;
/// Values that are summed in f32 before they go to f64.
const BLOCK: usize = 64 * LANES;

/// `sum p (ln p - ln q)`, in nats, of the distributions that two rows of logits stand for.
pub(crate) fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let top = |logits: &[f32]| logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let (p_top, q_top) = (top(p), top(q));
    let (mut p_sum, mut q_sum, mut difference) = (0.0f64, 0.0f64, 0.0f64);
    for (p, q) in p.chunks(BLOCK).zip(q.chunks(BLOCK)) {
        let mut sums = [[0.0f32; LANES]; 3];
        for (p, q) in p.chunks(LANES).zip(q.chunks(LANES)) {
            // a row's last values are filled up with what adds nothing
            let (mut a, mut b) = ([f32::NEG_INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
            a[..p.len()].copy_from_slice(p);
            b[..q.len()].copy_from_slice(q);
            for lane in 0..LANES {
                let (p, q) = ((a[lane] - p_top).max(LOWEST), (b[lane] - q_top).max(LOWEST));
                let weight = exp(p);
                sums[0][lane] += weight;
                sums[1][lane] += exp(q);
                sums[2][lane] += weight * (p - q);
            }
        }
        let [p, q, part] = sums.map(|sums| sums.iter().map(|sum| f64::from(*sum)).sum::<f64>());
        p_sum += p;
        q_sum += q;
        difference += part;
    }
    difference / p_sum - p_sum.ln() + q_sum.ln()
}

/// The least exponent that is told apart: `e^-87` is 1e-38, the least normal number.
const LOWEST: f32 = -87.0;

/// `e^x` for `LOWEST <= x <= 0`, to 2e-7: `2^n e^r` with `|r| <= ln 2 / 2`, and a polynomial for `e^r`.
#[inline]
fn exp(x: f32) -> f32 {
    // adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 355.0 / 512.0; // short, so that its product with n is exact
    const LN_2_LOW: f32 = -2.121_944_4e-4; // the rest
    let rounded = x * LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    let series = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    let value = series.iter().fold(0.0, |sum, term| sum * r + term);
    let power = rounded.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    value * f32::from_bits(power)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials() {
        for i in 0..=87_000u32 {
            let x = -(i as f32) / 1000.0;
            let exact = f64::from(x).exp();

            assert!((f64::from(exp(x)) - exact).abs() <= 2e-7 * exact, "{x}");
        }
    }

    #[test]
    fn divergence_of_known_distributions() {
        let logits = |p: [f64; 3], shift: f64| p.map(|p| (p.ln() + shift) as f32);
        let (p, q) = ([0.5f64, 0.3, 0.2], [0.25f64, 0.25, 0.5]);
        let exact: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
        // logits are rounded to f32: 1e-6 of values around 10
        assert!((divergence(&logits(p, 9.0), &logits(q, -3.0)) - exact).abs() < 2e-6);
        assert_eq!(divergence(&logits(p, 1.0), &logits(p, 1.0)), 0.0);
    }

    /// Any length, against sums in f64.
    #[test]
    fn divergence_of_long_rows() {
        for len in [1, 15, 16, 17, 1023, 5000] {
            let row = |step: usize| -> Vec<f32> { (0..len).map(|i| (i * step % 97) as f32 / 7.0).collect() };
            let (p, q) = (row(31), row(53));
            let lse = |x: &[f32]| x.iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln();
            let (a, b) = (lse(&p), lse(&q));
            let terms = p.iter().zip(&q).map(|(p, q)| {
                let (p, q) = (f64::from(*p) - a, f64::from(*q) - b);
                p.exp() * (p - q)
            });
            let exact: f64 = terms.sum();
            assert!((divergence(&p, &q) - exact).abs() < 1e-5 * exact.max(1.0), "{len}");
        }
    }
}
