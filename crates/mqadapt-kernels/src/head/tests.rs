use super::{RowScore, ScoreHead};
use crate::{
    Isa, Precision, WeightsRef,
    testing::{Stored, close, cpus, random},
};
use half::bf16;

#[test]
fn scores_equal_those_of_all_logits() {
    for (rows, vocab, k, softcap) in [(1, 5000, 40, None), (130, 4099, 24, Some(2.0)), (7, 3, 8, None)] {
        let hidden = random(1, rows * k);
        let weights = Stored::random(2, vocab * k);
        let targets: Vec<u32> = (0..rows * 2).map(|at| (at * 977 % vocab) as u32).collect();
        // Row 0 wants none, row 1 (where there is one) two more than the others, ...
        let starts: Vec<usize> = (0..=rows).map(|row| if row == 0 { 0 } else { (row - 1) * 2 }).collect();
        for cpu in cpus() {
            for (lm_head, values) in weights.weights() {
                for precision in [Precision::Exact, Precision::Fast] {
                    let round = precision == Precision::Fast && matches!(lm_head, WeightsRef::Bf16(_));
                    let x = |v: f32| if round { bf16::from_f32(v).to_f64() } else { f64::from(v) };
                    let head = ScoreHead {
                        lm_head,
                        hidden_size: k,
                        softcap,
                        precision,
                        targets: &targets,
                        target_starts: &starts,
                    };
                    let mut scores = vec![RowScore::default(); rows];
                    let mut logits = vec![0.0; targets.len()];
                    cpu.score_head(&head, &hidden, &mut scores, &mut logits);
                    for row in 0..rows {
                        let hidden = &hidden[row * k..][..k];
                        let all: Vec<f64> = values
                            .chunks_exact(k)
                            .map(|w| hidden.iter().zip(w).map(|(x64, w)| x(*x64) * w).sum::<f64>())
                            .map(|z| softcap.map(f64::from).map_or(z, |cap| cap * (z / cap).tanh()))
                            .collect();
                        let largest = all.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                        let lse = largest + all.iter().map(|z| (z - largest).exp()).sum::<f64>().ln();
                        let score = scores[row];
                        let what = format!("{cpu:?} {precision:?} row {row}");
                        close(&what, &[score.log_sum_exp, score.max_logit], &[lse, largest], 5e-6);
                        assert!(all[score.argmax as usize] >= largest - 1e-4, "{what}");
                        for at in starts[row]..starts[row + 1] {
                            close(&what, &[logits[at]], &[all[targets[at] as usize]], 5e-6);
                        }
                    }
                }
            }
        }
    }
}

/// The first of equal logits wins, and rows do not depend on their company.
#[test]
fn ties_and_batches() {
    let (rows, vocab, k) = (100, 5000, 16);
    let hidden = random(1, rows * k);
    let mut weights = Stored::random(2, vocab * k);
    // The second half repeats the first: every logit comes twice.
    weights.bf16.copy_within(..vocab / 2 * k, vocab / 2 * k);
    for cpu in cpus() {
        let run = |hidden: &[f32]| {
            let rows = hidden.len() / k;
            let head = ScoreHead {
                lm_head: WeightsRef::Bf16(&weights.bf16),
                hidden_size: k,
                softcap: None,
                precision: Precision::Fast,
                targets: &[],
                target_starts: &vec![0; rows + 1],
            };
            let mut scores = vec![RowScore::default(); rows];
            cpu.score_head(&head, hidden, &mut scores, &mut []);
            scores
        };
        let all = run(&hidden);
        assert!(all.iter().all(|score| (score.argmax as usize) < vocab / 2));
        for row in [0, 50, 99] {
            assert_eq!(run(&hidden[row * k..][..k]), all[row..=row]);
        }
    }
}

#[test]
fn nan_is_not_lost() {
    for cpu in cpus() {
        let head = ScoreHead {
            lm_head: WeightsRef::F32(&[1.0, f32::NAN, 2.0]),
            hidden_size: 1,
            softcap: None,
            precision: Precision::Exact,
            targets: &[],
            target_starts: &[0, 0],
        };
        let mut score = [RowScore::default()];
        cpu.score_head(&head, &[1.0], &mut score, &mut []);
        assert!(score[0].log_sum_exp.is_nan(), "{}", Isa::Scalar);
    }
}
