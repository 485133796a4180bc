//! Element-wise functions: gated activations, residual addition, soft-capping.

use crate::{
    Cpu, Isa,
    pool::Parts,
    simd::{Simd, kernel},
};

/// An activation function of an MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Activation {
    /// `x / (1 + e^-x)` (`silu`, Llama).
    Silu,
    /// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))` (`gelu_pytorch_tanh`, Gemma).
    GeluTanh,
    /// `x / 2 * (1 + erf(x / sqrt(2)))` (`gelu`, GPT-NeoX).
    Gelu,
}

impl Activation {
    /// `out = activation(gate) * up`, on slices of one length, on this thread.
    pub(crate) fn gate(self, isa: Isa, gate: &[f32], up: &[f32], out: &mut [f32]) {
        let n = out.len();
        assert!(gate.len() == n && up.len() == n, "gate, up and out are equally long");
        // SAFETY: three slices of `n`; a `Cpu` holds only an available `isa`.
        unsafe { gated(isa, self, gate.as_ptr(), Some(up), out.as_mut_ptr(), n) }
    }
}

impl Cpu {
    /// `out = activation(gate) * up`, element-wise.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn gate(&self, activation: Activation, gate: &[f32], up: &[f32], out: &mut [f32]) {
        assert!(gate.len() == out.len() && up.len() == out.len(), "gate, up and out are equally long");
        let parts = Parts::new(out);
        self.by_rows(gate.len(), 1, |first, n| {
            // SAFETY: parts are disjoint.
            let out = unsafe { parts.part(first, n) };
            activation.gate(self.isa, &gate[first..][..n], &up[first..][..n], out);
        });
    }

    /// `x = activation(x)`, element-wise.
    pub fn activate(&self, activation: Activation, x: &mut [f32]) {
        let (len, parts) = (x.len(), Parts::new(x));
        self.by_rows(len, 1, |first, n| {
            // SAFETY: parts are disjoint.
            let x = unsafe { parts.part(first, n) };
            // SAFETY: in place on `n` values; a `Cpu` holds only an available `isa`.
            unsafe { gated(self.isa, activation, x.as_ptr(), None, x.as_mut_ptr(), n) };
        });
    }

    /// `x += y`, element-wise.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn add(&self, x: &mut [f32], y: &[f32]) {
        assert_eq!(x.len(), y.len(), "x and y are equally long");
        let (len, parts) = (x.len(), Parts::new(x));
        self.by_rows(len, 1, |first, n| {
            // SAFETY: parts are disjoint.
            let x = unsafe { parts.part(first, n) };
            // A loop that the compiler vectorises; addition has one right answer.
            x.iter_mut().zip(&y[first..][..n]).for_each(|(x, y)| *x += y);
        });
    }

    /// `x = cap * tanh(x / cap)`, element-wise (Gemma 2).
    pub fn softcap(&self, x: &mut [f32], cap: f32) {
        let (len, parts) = (x.len(), Parts::new(x));
        self.by_rows(len, 1, |first, n| {
            // SAFETY: parts are disjoint.
            softcap(self.isa, unsafe { parts.part(first, n) }, cap);
        });
    }
}

/// `x = cap * tanh(x / cap)` on this thread.
pub(crate) fn softcap(isa: Isa, x: &mut [f32], cap: f32) {
    // SAFETY: a slice; a `Cpu` holds only an available `isa`.
    unsafe { capped(isa, x.as_mut_ptr(), x.len(), cap) }
}

kernel! {
    fn gated = gated_body(activation: Activation, gate: *const f32, up: Option<&[f32]>, out: *mut f32, n: usize)
}
kernel! {
    fn capped = capped_body(x: *mut f32, n: usize, cap: f32)
}

/// # Safety
/// `gate`, `up` and `out` have `n` values; `gate` may be `out`.
#[inline(always)]
unsafe fn gated_body<S: Simd>(activation: Activation, gate: *const f32, up: Option<&[f32]>, out: *mut f32, n: usize) {
    let mut i = 0;
    while i < n {
        let left = n - i;
        // SAFETY: reads and writes the lanes below `n`.
        unsafe {
            let g = S::load_some(gate.add(i), left);
            let g = match activation {
                Activation::Silu => S::div(g, S::add(S::splat(1.0), S::exp(S::sub(S::zero(), g)))),
                Activation::GeluTanh => gelu_tanh::<S>(g),
                Activation::Gelu => gelu::<S>(g),
            };
            let v = match up {
                Some(up) => S::mul(g, S::load_some(up.as_ptr().add(i), left)),
                None => g,
            };
            S::store_some(out.add(i), left, v);
        }
        i += S::LANES;
    }
}

/// `x * sigmoid(2 y)` equals `x / 2 * (1 + tanh(y))`.
#[inline(always)]
unsafe fn gelu_tanh<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the caller's promise.
    unsafe {
        let cubic = S::fma(S::mul(S::mul(x, x), x), S::splat(0.044_715), x);
        let minus_2y = S::mul(cubic, S::splat(-2.0 * 0.797_884_6));
        S::div(x, S::add(S::splat(1.0), S::exp(minus_2y)))
    }
}

/// `ln(e^(z^2) erfc(z) / t)` by powers of `t = 1 / (1 + z / 2)`, the highest first: fitted at the Chebyshev points of `z <= 9`, where it
/// is good to 3e-7.
const LN_ERFC: [f32; 9] = [
    0.091_581_6,
    -0.618_558_2,
    1.606_657_9,
    -1.932_66,
    0.956_339_66,
    -0.280_043_87,
    0.450_326_3,
    0.991_463,
    -1.265_106_4,
];

/// `max(x, 0) - |x| / 2 * erfc(|x| / sqrt(2))` equals `x / 2 * (1 + erf(x / sqrt(2)))`, and cancels nowhere.
#[inline(always)]
unsafe fn gelu<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the caller's promise.
    unsafe {
        let zero = S::zero();
        // from 14 on the second term is zero
        let size = S::min(S::splat(14.0), S::max(x, S::sub(zero, x)));
        let z = S::mul(size, S::splat(std::f32::consts::FRAC_1_SQRT_2));
        let t = S::div(S::splat(1.0), S::fma(z, S::splat(0.5), S::splat(1.0)));
        let mut exponent = zero;
        for c in LN_ERFC {
            exponent = S::fma(exponent, t, S::splat(c));
        }
        let exponent = S::fma(S::sub(zero, z), z, exponent);
        let half_size_t = S::mul(S::mul(size, S::splat(0.5)), t);
        S::sub(S::max(zero, x), S::mul(half_size_t, S::exp(exponent)))
    }
}

/// The least `y^2` for which `tanh` takes the quotient, and the number before it.
const FAR: f32 = 0.03;
const NEAR: f32 = f32::from_bits(FAR.to_bits() - 1);

/// `cap * tanh(x / cap)`.
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
pub(crate) unsafe fn softcap_lanes<S: Simd>(x: S::V, cap: S::V) -> S::V {
    // SAFETY: the caller's promise.
    unsafe {
        let y = S::div(x, cap);
        // Near zero `1 - 2 / (1 + e^2y)` cancels; the odd series is good to 1e-7 there.
        let y2 = S::mul(y, y);
        let e = S::exp(S::add(y, y));
        let far = S::sub(S::splat(1.0), S::div(S::splat(2.0), S::add(e, S::splat(1.0))));
        let mut series = S::splat(-17.0 / 315.0);
        for c in [2.0 / 15.0, -1.0 / 3.0, 1.0] {
            series = S::fma(series, y2, S::splat(c));
        }
        let near = S::mul(series, y);
        let (far, near) =
            (S::zero_below(y2, S::splat(FAR), far), S::zero_below(S::sub(S::zero(), y2), S::splat(-NEAR), near));
        S::mul(cap, S::add(far, near))
    }
}

/// # Safety
/// `x` has `n` values.
#[inline(always)]
unsafe fn capped_body<S: Simd>(x: *mut f32, n: usize, cap: f32) {
    let mut i = 0;
    while i < n {
        // SAFETY: reads and writes the lanes below `n`.
        unsafe {
            let v = softcap_lanes::<S>(S::load_some(x.add(i), n - i), S::splat(cap));
            S::store_some(x.add(i), n - i, v);
        }
        i += S::LANES;
    }
}

#[cfg(test)]
mod tests {
    use crate::{
        Activation,
        testing::{close, cpus, random},
    };

    fn values() -> Vec<f32> {
        let mut values: Vec<f32> = random(1, 1003).iter().map(|value| 12.0 * value * value * value).collect();
        values.extend([0.0, -0.0, 1e-30, 100.0, -100.0, 1e30, -1e30]);
        values
    }

    #[test]
    fn activations() {
        let (x, up) = (values(), random(2, values().len()));
        let silu = |x: f64| x / (1.0 + (-x).exp());
        let gelu =
            |x: f64| x / 2.0 * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh());
        let gelu_erf = |x: f64| x / 2.0 * libm::erfc(-x * std::f64::consts::FRAC_1_SQRT_2);
        for cpu in cpus() {
            for (activation, exact) in [
                (Activation::Silu, &silu as &dyn Fn(f64) -> f64),
                (Activation::GeluTanh, &gelu),
                (Activation::Gelu, &gelu_erf),
            ] {
                let mut out = x.clone();
                cpu.activate(activation, &mut out);
                let expected: Vec<f64> = x.iter().map(|&x| exact(f64::from(x))).collect();
                close(&format!("{cpu:?} {activation:?}"), &out, &expected, 5e-7);
                cpu.gate(activation, &x, &up, &mut out);
                let expected: Vec<f64> = expected.iter().zip(&up).map(|(value, &up)| value * f64::from(up)).collect();
                close(&format!("{cpu:?} {activation:?} gate"), &out, &expected, 5e-7);
            }
        }
    }

    #[test]
    fn softcap() {
        for cpu in cpus() {
            for cap in [0.5f32, 2.0, 30.0] {
                let mut out = values();
                cpu.softcap(&mut out, cap);
                let exact = |x: f32| f64::from(cap) * (f64::from(x) / f64::from(cap)).tanh();
                let expected: Vec<f64> = values().into_iter().map(exact).collect();
                close(&format!("{cpu:?} {cap}"), &out, &expected, 3e-7 * f64::from(cap.max(1.0)));
            }
        }
    }

    #[test]
    fn add_and_nan() {
        for cpu in cpus() {
            let mut x = vec![1.0, f32::NAN];
            cpu.add(&mut x, &[2.0, 1.0]);
            assert_eq!(x[0], 3.0);
            cpu.softcap(&mut x, 1.0);
            cpu.activate(Activation::Silu, &mut x);
            cpu.activate(Activation::GeluTanh, &mut x);
            cpu.activate(Activation::Gelu, &mut x);
            assert!(x[1].is_nan(), "{cpu:?}");
        }
    }
}
