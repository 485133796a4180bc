//! Instruction sets: what the processor has, and which one runs.

use std::{fmt, str::FromStr};

/// A tier of kernels. Later variants are preferred where the processor has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// Portable Rust; the reference that every other tier is tested against.
    Scalar,
    /// Arm NEON (always present on 64-bit Arm).
    Neon,
    /// x86 AVX2 with FMA and F16C.
    Avx2,
    /// x86 AVX-512 F, BW, DQ and VL.
    Avx512,
    /// [`Isa::Avx512`] with BF16 and VNNI (every processor with the one has the other): `vdpbf16ps` and `vpdpbusd` for
    /// [`Precision::Fast`](crate::Precision::Fast) products.
    Avx512Bf16,
}

impl Isa {
    /// Every tier, least preferred first.
    pub const ALL: [Self; 5] = [Self::Scalar, Self::Neon, Self::Avx2, Self::Avx512, Self::Avx512Bf16];

    /// Whether this processor (and build) can run the tier.
    #[must_use]
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            Self::Neon => cfg!(target_arch = "aarch64"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => {
                Self::Avx512.is_available()
                    && is_x86_feature_detected!("avx512bf16")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 | Self::Avx512Bf16 => false,
        }
    }

    /// The tiers this processor can run, least preferred first.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_available())
    }

    /// The best available tier, or the one that the environment variable `MQADAPT_ISA` names.
    ///
    /// # Errors
    /// A message for the user if `MQADAPT_ISA` names no tier or one that this processor lacks.
    pub fn detect() -> Result<Self, String> {
        match std::env::var("MQADAPT_ISA") {
            Ok(name) if !name.is_empty() => {
                let isa = name.parse::<Self>()?;
                if isa.is_available() {
                    return Ok(isa);
                }
                let have: Vec<_> = Self::available().map(|isa| isa.to_string()).collect();
                Err(format!("MQADAPT_ISA={name}: this processor lacks it; it has {}", have.join(", ")))
            }
            _ => Ok(Self::available().last().unwrap_or(Self::Scalar)),
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Scalar => "scalar",
            Self::Neon => "neon",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
        })
    }
}

impl FromStr for Isa {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|isa| isa.to_string().eq_ignore_ascii_case(name)).ok_or_else(|| {
            let known = Self::ALL.map(|isa| isa.to_string()).join(", ");
            format!("MQADAPT_ISA={name}: unknown instruction set; expected one of {known}")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for isa in Isa::ALL {
            assert_eq!(isa.to_string().parse(), Ok(isa));
        }
        assert!("avx1024".parse::<Isa>().unwrap_err().contains("avx512bf16"));
    }

    #[test]
    fn scalar_is_always_available() {
        assert_eq!(Isa::available().next(), Some(Isa::Scalar));
    }
}
