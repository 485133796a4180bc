//! Rotary position embedding: its parameters and inverse frequencies (`transformers/modeling_rope_utils.py`).

use std::f64::consts::PI;

use serde_json::Value;

use super::fields::Fields;
use crate::{Error, Result};

/// Rotary position embedding. Pairs are `(j, j + head_dim / 2)`.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// How the frequencies are stretched for longer contexts.
    pub scaling: RopeScaling,
    /// Values per head, all of them rotated.
    pub head_dim: usize,
}

/// How the frequencies are stretched for longer contexts.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, the medium ones blended.
    Llama3 {
        /// The divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are low.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are high.
        high_freq_factor: f64,
        /// Context of the model before it was stretched.
        original_max_position_embeddings: f64,
    },
}

impl Rope {
    /// Inverse frequency of each pair, `[head_dim / 2]`, computed in f64.
    #[must_use]
    pub fn inv_freq(&self) -> Vec<f64> {
        let exponent = |j: usize| (2 * j) as f64 / self.head_dim as f64;
        (0..self.head_dim / 2).map(|j| self.stretch(self.theta.powf(-exponent(j)))).collect()
    }

    fn stretch(&self, inv_freq: f64) -> f64 {
        match self.scaling {
            RopeScaling::None => inv_freq,
            RopeScaling::Linear { factor } => inv_freq / factor,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let turns = original_max_position_embeddings * inv_freq / (2.0 * PI);
                if turns < low_freq_factor {
                    return inv_freq / factor;
                }
                if turns > high_freq_factor {
                    return inv_freq;
                }
                let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                (1.0 - smooth) * inv_freq / factor + smooth * inv_freq
            }
        }
    }

    /// Reads `rope_scaling` and `rope_theta` (transformers 4.x) or `rope_parameters` (5), as version 5 does: a
    /// `rope_scaling` with anything in it takes the place of `rope_parameters` (`convert_rope_params_to_dict`).
    pub(super) fn read(
        fields: &Fields,
        default_theta: f64,
        max_position_embeddings: usize,
        head_dim: usize,
    ) -> Result<Self> {
        let top_theta = fields.positive("rope_theta")?;
        let Some((name, value)) = given(|name| fields.get(name)) else {
            return Ok(Self { theta: top_theta.unwrap_or(default_theta), scaling: RopeScaling::None, head_dim });
        };
        let own = Fields::new(value).map_err(|_| fields.wrong(name, "an object"))?;
        let inside = |e: Error| match e {
            Error::Config { field, detail } => Error::Config { field: format!("{name}.{field}"), detail },
            other => other,
        };
        let number = |field: &str| own.positive(field).map_err(inside)?.ok_or_else(|| inside(own.missing(field)));
        if let Some((layers, _)) = value.as_object().into_iter().flatten().find(|(_, own)| own.is_object()) {
            return Err(inside(
                own.wrong(layers, "a number or a name (rotary embedding by kind of layer is not supported)"),
            ));
        }
        let theta = own.positive("rope_theta").map_err(inside)?.or(top_theta).unwrap_or(default_theta);
        if own.get("partial_rotary_factor").is_some_and(|v| v.as_f64() != Some(1.0)) {
            return Err(inside(own.wrong("partial_rotary_factor", "1.0 (partial rotary embedding is not supported)")));
        }
        let (kind, old_kind) = (own.text("rope_type").map_err(inside)?, own.text("type").map_err(inside)?);
        if let (Some(kind), Some(old)) = (kind, old_kind)
            && kind != old
        {
            // versions 4 and 5 take different ones
            return Err(inside(own.wrong("type", &format!("the rope_type '{kind}', or absent"))));
        }
        let scaling = match kind.or(old_kind).unwrap_or("default") {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: number("factor")? },
            "llama3" => {
                let (low, high) = (number("low_freq_factor")?, number("high_freq_factor")?);
                if low >= high {
                    return Err(inside(own.wrong("low_freq_factor", "below high_freq_factor")));
                }
                let field = "original_max_position_embeddings";
                let original = fields.positive(field)?.or(own.positive(field).map_err(inside)?);
                RopeScaling::Llama3 {
                    factor: number("factor")?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_max_position_embeddings: original.unwrap_or(max_position_embeddings as f64),
                }
            }
            _ => return Err(inside(own.wrong("rope_type", "one of default, linear, llama3"))),
        };
        Ok(Self { theta, scaling, head_dim })
    }
}

/// The field that says how positions are rotated, and what it says.
pub(super) fn given<'a>(field: impl Fn(&str) -> Option<&'a Value>) -> Option<(&'static str, &'a Value)> {
    let names = ["rope_scaling", "rope_parameters"];
    let filled = |value: &&Value| value.as_object().is_none_or(|fields| !fields.is_empty());
    names.into_iter().find_map(|name| Some((name, field(name).filter(filled)?)))
}
