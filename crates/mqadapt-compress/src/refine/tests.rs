use super::{RefineOptions, Target, gradient, refine};
use mqadapt_core::Progressing;

use crate::heads::closed_form::outputs;
use crate::heads::closed_form::tests::{Noise, geometry, random_layer};
use mqadapt_core::AttentionShape;

use crate::Error;

/// Inputs, and the outputs of another layer on them.
fn targets(geometry: &AttentionShape, heads: usize, noise: &mut Noise) -> Vec<Target> {
    let truth = random_layer(&AttentionShape { num_key_value_heads: heads, ..geometry.clone() }, true, noise);
    [70, 40]
        .iter()
        .map(|tokens| {
            let x = noise.vec(tokens * geometry.hidden_size, 1.0);
            let y = outputs(&truth, geometry, heads, &x, &Progressing::UNWATCHED).unwrap();
            Target { x, y }
        })
        .collect()
}

#[test]
fn the_gradient_is_that_of_the_error() {
    holds(&AttentionShape { sliding_window: Some(30), ..geometry(4, 2, 8, 3) });
}

#[test]
fn the_gradient_passes_soft_capping_and_the_factor_of_rotated_dims() {
    holds(&AttentionShape { attn_logit_softcapping: Some(0.7), rotary_factor: 1.3, ..geometry(4, 2, 8, 3) });
}

/// The gradient is the slope of the error.
fn holds(geometry: &AttentionShape) {
    let mut noise = Noise(31);
    let weights = random_layer(geometry, true, &mut noise);
    let target = &targets(geometry, 2, &mut noise)[0];
    let found = gradient(&weights, geometry, None, 2, target, &Progressing::UNWATCHED).unwrap();
    let error = |weights: &crate::LayerWeights| {
        gradient(weights, geometry, None, 2, target, &Progressing::UNWATCHED).unwrap().error
    };
    let mut by = found.by.clone();
    for (at, by) in by.tensors().into_iter().enumerate() {
        // along the gradient and along one other direction
        for direction in [by.clone(), noise.vec(by.len(), 1.0)] {
            let size: f32 = direction.iter().map(|v| v * v).sum::<f32>().sqrt();
            let along = |step: f32| {
                let mut moved = weights.clone();
                moved.tensors()[at].iter_mut().zip(&direction).for_each(|(w, d)| *w += step * d / size);
                error(&moved)
            };
            let numeric = (along(1e-2) - along(-1e-2)) / 2e-2;
            let slope: f64 = by.iter().zip(&direction).map(|(a, b)| f64::from(a * b / size)).sum::<f64>() * 2.0;
            // f32 forward passes differ in the seventh digit of an error of order 1000
            assert!((numeric - slope).abs() < 2e-2 * slope.abs() + 0.5, "tensor {at}: {numeric} {slope}");
        }
    }
}

#[test]
fn steps_lower_the_error_and_do_not_depend_on_threads() {
    let mut noise = Noise(32);
    let geometry = geometry(6, 3, 8, 4);
    let merged = AttentionShape { num_key_value_heads: 1, ..geometry.clone() };
    let weights = random_layer(&merged, false, &mut noise);
    let targets = targets(&geometry, 3, &mut noise);
    let options = RefineOptions { steps: 60, rate: 0.02 };
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            refine::<Error>(&weights, &geometry, None, 1, &options, &Progressing::UNWATCHED, |step| {
                Ok(targets[step % 2].clone())
            })
            .unwrap()
        })
    };
    let moved = run(1);
    assert_eq!(moved, run(3));
    let error = |w| {
        targets.iter().map(|t| gradient(w, &geometry, None, 1, t, &Progressing::UNWATCHED).unwrap().error).sum::<f64>()
    };
    assert!(error(&moved) < 0.8 * error(&weights), "{} {}", error(&moved), error(&weights));
    let same = refine::<Error>(
        &weights,
        &geometry,
        None,
        1,
        &RefineOptions { steps: 0, ..options },
        &Progressing::UNWATCHED,
        |_| unreachable!(),
    );
    assert_eq!(same.unwrap(), weights);
}

#[test]
fn what_the_gradient_does_not_cover_is_refused() {
    let geometry = AttentionShape { qk_norm: true, ..geometry(4, 2, 8, 3) };
    let weights = random_layer(&geometry, false, &mut Noise(33));
    let refused = refine::<Error>(
        &weights,
        &geometry,
        None,
        2,
        &RefineOptions::default(),
        &Progressing::UNWATCHED,
        |_| unreachable!(),
    );
    assert!(matches!(refused, Err(Error::Option(_))));
    let short = Target { x: vec![0.0; geometry.hidden_size], y: Vec::new() };
    let geometry = AttentionShape { qk_norm: false, ..geometry };
    let refused =
        refine::<Error>(&weights, &geometry, None, 2, &RefineOptions::default(), &Progressing::UNWATCHED, |_| {
            Ok(short.clone())
        });
    assert!(matches!(refused, Err(Error::Shape { name: "y", .. })));
}
