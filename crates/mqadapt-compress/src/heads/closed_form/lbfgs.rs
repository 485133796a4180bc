//! L-BFGS with a strong-Wolfe line search (Nocedal and Wright, algorithms 7.5,
//! 3.5 and 3.6). Sequential and deterministic.

use std::collections::VecDeque;

/// Corrections kept.
const HISTORY: usize = 10;
/// Sufficient decrease and curvature constants.
const C1: f64 = 1e-4;
const C2: f64 = 0.9;
/// Evaluations one line search may take.
const LINE_EVALUATIONS: usize = 20;

/// A point on the search line.
#[derive(Clone)]
struct Point {
    step: f64,
    value: f64,
    slope: f64,
    gradient: Vec<f64>,
}

/// Minimises `f(x, gradient) -> value` from `x` on, in place. A value that is
/// not finite counts as infinitely bad; `x` never gets worse.
pub(crate) fn minimise(x: &mut [f64], iterations: usize, mut f: impl FnMut(&[f64], &mut [f64]) -> f64) {
    let mut gradient = vec![0.0; x.len()];
    let mut value = f(x, &mut gradient);
    let mut history: VecDeque<(Vec<f64>, Vec<f64>, f64)> = VecDeque::new();
    for iteration in 0..iterations {
        if !value.is_finite() || gradient.iter().fold(0.0f64, |a, g| a.max(g.abs())) < 1e-9 {
            return;
        }
        let direction = direction(&gradient, &history);
        let slope = dot(&direction, &gradient);
        if slope >= 0.0 {
            return;
        }
        let first = if iteration == 0 { (1.0 / gradient.iter().map(|g| g.abs()).sum::<f64>()).min(1.0) } else { 1.0 };
        let start = Point { step: 0.0, value, slope, gradient: gradient.clone() };
        let Some(next) = line_search(x, &direction, &start, first, &mut f) else { return };
        let step: Vec<f64> = direction.iter().map(|d| d * next.step).collect();
        let change: Vec<f64> = next.gradient.iter().zip(&gradient).map(|(a, b)| a - b).collect();
        x.iter_mut().zip(&step).for_each(|(x, s)| *x += s);
        let curvature = dot(&step, &change);
        if curvature > 1e-10 * dot(&change, &change) {
            if history.len() == HISTORY {
                history.pop_front();
            }
            history.push_back((step, change, 1.0 / curvature));
        }
        let gain = value - next.value;
        (value, gradient) = (next.value, next.gradient);
        if gain < 1e-9 * value.abs() {
            return;
        }
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The two-loop recursion: minus the inverse Hessian times the gradient.
fn direction(gradient: &[f64], history: &VecDeque<(Vec<f64>, Vec<f64>, f64)>) -> Vec<f64> {
    let mut q: Vec<f64> = gradient.iter().map(|g| -g).collect();
    let mut alphas = Vec::with_capacity(history.len());
    for (s, y, rho) in history.iter().rev() {
        let alpha = rho * dot(s, &q);
        q.iter_mut().zip(y).for_each(|(q, y)| *q -= alpha * y);
        alphas.push(alpha);
    }
    if let Some((_, y, rho)) = history.back() {
        let scale = 1.0 / (rho * dot(y, y));
        for q in &mut q {
            *q *= scale;
        }
    }
    for ((s, y, rho), alpha) in history.iter().zip(alphas.iter().rev()) {
        let beta = rho * dot(y, &q);
        q.iter_mut().zip(s).for_each(|(q, s)| *q += (alpha - beta) * s);
    }
    q
}

/// A step that meets the strong Wolfe conditions, or the best that decreases enough.
fn line_search(
    x: &[f64],
    direction: &[f64],
    start: &Point,
    first: f64,
    f: &mut impl FnMut(&[f64], &mut [f64]) -> f64,
) -> Option<Point> {
    let mut at = |step: f64| {
        let moved: Vec<f64> = x.iter().zip(direction).map(|(x, d)| x + step * d).collect();
        let mut gradient = vec![0.0; x.len()];
        let value = f(&moved, &mut gradient);
        let slope = dot(direction, &gradient);
        let finite = value.is_finite() && slope.is_finite();
        Point { step, value: if finite { value } else { f64::INFINITY }, slope, gradient }
    };
    let decreases = |p: &Point| p.value <= start.value + C1 * p.step * start.slope;
    let curves = |p: &Point| p.slope.abs() <= -C2 * start.slope;
    let mut previous = start.clone();
    let mut step = first;
    let mut used = 0;
    let (mut low, mut high) = loop {
        let point = at(step);
        used += 1;
        if !decreases(&point) || (used > 1 && point.value >= previous.value) {
            break (previous, point);
        }
        if curves(&point) {
            return Some(point);
        }
        if point.slope >= 0.0 {
            break (point, previous);
        }
        if used == LINE_EVALUATIONS {
            return Some(point);
        }
        previous = point;
        step *= 2.0;
    };
    while used < LINE_EVALUATIONS {
        let (left, right) = (low.step.min(high.step), low.step.max(high.step));
        if right - left < 1e-12 * right {
            break;
        }
        let guess = cubic_minimum(&low, &high);
        let margin = 0.1 * (right - left);
        let point =
            at(if guess.is_finite() { guess.clamp(left + margin, right - margin) } else { f64::midpoint(left, right) });
        used += 1;
        if !decreases(&point) || point.value >= low.value {
            high = point;
        } else {
            if curves(&point) {
                return Some(point);
            }
            if point.slope * (high.step - low.step) >= 0.0 {
                high = low;
            }
            low = point;
        }
    }
    (low.step > 0.0).then_some(low)
}

/// Minimiser of the cubic through two points with their slopes.
fn cubic_minimum(a: &Point, b: &Point) -> f64 {
    let d1 = a.slope + b.slope - 3.0 * (a.value - b.value) / (a.step - b.step);
    let d2 = (d1 * d1 - a.slope * b.slope).sqrt() * (b.step - a.step).signum();
    b.step - (b.step - a.step) * (b.slope + d2 - d1) / (b.slope - a.slope + 2.0 * d2)
}

#[cfg(test)]
mod tests {
    use super::minimise;

    #[test]
    fn finds_the_valley_of_rosenbrock() {
        let mut x = [-1.2, 1.0];
        let mut evaluations = 0;
        minimise(&mut x, 60, |x, g| {
            evaluations += 1;
            let (a, b) = (1.0 - x[0], x[1] - x[0] * x[0]);
            g[0] = -2.0 * a - 400.0 * x[0] * b;
            g[1] = 200.0 * b;
            a * a + 100.0 * b * b
        });
        assert!((x[0] - 1.0).abs() < 1e-5 && (x[1] - 1.0).abs() < 1e-5, "{x:?}");
        assert!(evaluations < 90, "{evaluations}");
    }

    #[test]
    fn keeps_the_start_where_the_function_is_not_finite() {
        let mut x = [1.0, 2.0];
        minimise(&mut x, 5, |_, _| f64::NAN);
        assert_eq!(x.to_vec(), [1.0, 2.0]);
    }

    #[test]
    fn steps_back_from_infinity() {
        // -ln(1 - x) + x^2 is infinite from x = 1 on; its minimum is where 1 / (1 - x) = -2 x
        let mut x = [0.9];
        minimise(&mut x, 30, |x, g| {
            g[0] = 1.0 / (1.0 - x[0]) + 2.0 * x[0];
            if x[0] < 1.0 { -(1.0 - x[0]).ln() + x[0] * x[0] } else { f64::NAN }
        });
        assert!((x[0] - (1.0 - 3.0f64.sqrt()) / 2.0).abs() < 1e-6, "{x:?}");
    }
}
