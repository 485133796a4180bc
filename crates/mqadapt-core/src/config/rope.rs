//! Rotary position embedding: its parameters and inverse frequencies (`transformers/modeling_rope_utils.py`).

use std::f64::consts::PI;

use serde_json::Value;

use super::fields::Fields;
use super::regime::RopeRegime;
use crate::family::{Family, Rotary};
use crate::{Error, Result};

/// Rotary position embedding. Pairs are `(j, j + rotary_dim / 2)`.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// How the frequencies are stretched for longer contexts.
    pub scaling: RopeScaling,
    /// Values of a head that are rotated, its first ones.
    pub rotary_dim: usize,
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
    /// Not at all up to the original context; beyond it the base grows with the length of the text.
    Dynamic {
        /// How fast the base grows.
        factor: f64,
        /// The original context, `max_position_embeddings`.
        context: usize,
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
    /// `YaRN` (arXiv 2309.00071): slow pairs divided by `factor`, a ramp between them and the fast ones.
    Yarn {
        /// The divisor of the slow pairs.
        factor: f64,
        /// Pairs below this one keep their frequency.
        low: f64,
        /// Pairs from this one on are divided.
        high: f64,
        /// Factor on rotated queries and keys.
        attention_factor: f64,
    },
    /// `LongRoPE` (arXiv 2402.13753): a divisor for each pair; another set beyond the original context.
    LongRope {
        /// The divisors up to the original context.
        short_factor: Vec<f64>,
        /// The divisors of longer texts.
        long_factor: Vec<f64>,
        /// The original context.
        context: usize,
        /// Factor on rotated queries and keys.
        attention_factor: f64,
    },
}

impl Rope {
    /// Inverse frequency of each pair up to the original context, `[rotary_dim / 2]`, computed in f64.
    #[must_use]
    pub fn inv_freq(&self) -> Vec<f64> {
        self.inv_freq_of(RopeRegime::default())
    }

    /// Inverse frequency of each pair in texts of a regime, `[rotary_dim / 2]`, computed in f64.
    #[must_use]
    pub fn inv_freq_of(&self, regime: RopeRegime) -> Vec<f64> {
        let dim = self.rotary_dim as f64;
        let theta = match self.scaling {
            RopeScaling::Dynamic { factor, context } if regime.is_beyond(context) => {
                let grown = factor * regime.tokens() as f64 / context as f64 - (factor - 1.0);
                self.theta * grown.powf(dim / (dim - 2.0))
            }
            _ => self.theta,
        };
        let inv_freq = |pair: usize| theta.powf(-((2 * pair) as f64 / dim));
        (0..self.rotary_dim / 2).map(|pair| self.stretch(pair, inv_freq(pair), regime)).collect()
    }

    /// Factor on rotated queries and keys.
    #[must_use]
    pub fn attention_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } | RopeScaling::LongRope { attention_factor, .. } => {
                attention_factor
            }
            _ => 1.0,
        }
    }

    /// The context beyond which the frequencies depend on the length of the text.
    pub(super) fn original_context(&self) -> Option<usize> {
        match self.scaling {
            RopeScaling::Dynamic { context, .. } | RopeScaling::LongRope { context, .. } => Some(context),
            _ => None,
        }
    }

    /// The shortest text with the frequencies of one of `tokens` tokens.
    pub(super) fn shortest_alike(&self, tokens: usize) -> usize {
        match self.scaling {
            RopeScaling::Dynamic { context, .. } if tokens > context => tokens,
            RopeScaling::LongRope { context, .. } if tokens > context => context + 1,
            _ => 0,
        }
    }

    fn stretch(&self, pair: usize, inv_freq: f64, regime: RopeRegime) -> f64 {
        match &self.scaling {
            RopeScaling::None | RopeScaling::Dynamic { .. } => inv_freq,
            RopeScaling::Linear { factor } => inv_freq / factor,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let turns = original_max_position_embeddings * inv_freq / (2.0 * PI);
                if turns < *low_freq_factor {
                    return inv_freq / factor;
                }
                if turns > *high_freq_factor {
                    return inv_freq;
                }
                let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                (1.0 - smooth) * inv_freq / factor + smooth * inv_freq
            }
            RopeScaling::Yarn { factor, low, high, .. } => {
                let ramp = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                inv_freq / factor * ramp + inv_freq * (1.0 - ramp)
            }
            RopeScaling::LongRope { short_factor, long_factor, context, .. } => {
                let factors = if regime.is_beyond(*context) { long_factor } else { short_factor };
                inv_freq / factors.get(pair).copied().unwrap_or(1.0)
            }
        }
    }
}

/// What the parameters are read from, and what they mean where they are left out.
struct Source<'a> {
    fields: &'a Fields<'a>,
    family: &'static Family,
    head_dim: usize,
    max_position_embeddings: usize,
}

/// Reads the rotary embedding of every layer; `windows`: which of them have a window. `None`: not rotated.
pub(super) fn of_layers(
    fields: &Fields<'_>,
    family: &'static Family,
    head_dim: usize,
    max_position_embeddings: usize,
    windows: &[bool],
) -> Result<Vec<Option<Rope>>> {
    let source = Source { fields, family, head_dim, max_position_embeddings };
    match family.forward.rotary {
        Rotary::Learned => Ok(vec![None; windows.len()]),
        Rotary::Alike | Rotary::Partial | Rotary::Fraction(_) => Ok(vec![Some(source.alike()?); windows.len()]),
        Rotary::ByKind { local_theta, local_field } => {
            let [global, local] = source.by_kind(local_theta, local_field)?;
            Ok(windows.iter().map(|slides| Some(if *slides { local.clone() } else { global.clone() })).collect())
        }
        Rotary::SomeLayers => {
            let rope = source.alike()?;
            Ok(fields.rotated_layers(windows.len())?.into_iter().map(|yes| yes.then(|| rope.clone())).collect())
        }
    }
}

impl Source<'_> {
    /// Reads `rope_scaling` and `rope_theta` (transformers 4.x) or `rope_parameters` (5), as version 5 does: a
    /// `rope_scaling` with anything in it takes the place of `rope_parameters` (`convert_rope_params_to_dict`).
    fn alike(&self) -> Result<Rope> {
        let fields = self.fields;
        let theta = fields.positive("rope_theta")?.unwrap_or(self.family.defaults.rope_theta);
        let Some((name, value)) = given(|name| fields.get(name)) else { return self.plain(theta) };
        let own = Fields::new(value).map_err(|_| fields.wrong(name, "an object"))?;
        if let Some((layers, _)) = value.as_object().into_iter().flatten().find(|(_, own)| own.is_object()) {
            let expected = "a number or a name (rotary embedding by kind of layer is not supported)";
            return Err(inside(name)(own.wrong(layers, expected)));
        }
        self.read(&own, theta).map_err(inside(name))
    }

    /// The parameters of the layers without a window and of those with one (`configuration_gemma3.py`).
    fn by_kind(&self, local_theta: f64, local_field: Option<&str>) -> Result<[Rope; 2]> {
        let fields = self.fields;
        let name = "rope_parameters";
        let nested = fields.get(name);
        let theta = fields.positive("rope_theta")?.unwrap_or(self.family.defaults.rope_theta);
        let local = local_field.map(|field| fields.positive(field)).transpose()?.flatten().unwrap_or(local_theta);
        let kinds = ["full_attention", "sliding_attention"];
        if let Some(other) = nested
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
            .find(|(key, value)| !kinds.contains(&key.as_str()) || !(value.is_object() || value.is_null()))
        {
            let detail = "is not expected: parameters stand under full_attention and sliding_attention".to_owned();
            return Err(Error::Config { field: format!("{name}.{}", other.0), detail });
        }
        let of = |kind: &str, theta: f64| {
            let own = nested.and_then(|nested| nested.get(kind)).filter(|own| !own.is_null());
            let mut merged = own.and_then(Value::as_object).cloned().unwrap_or_default();
            if kind == kinds[0]
                && let Some(scaling) = fields.get("rope_scaling")
            {
                let scaling = scaling.as_object().ok_or_else(|| fields.wrong("rope_scaling", "an object"))?;
                merged.extend(scaling.iter().map(|(key, value)| (key.clone(), value.clone())));
            }
            let merged = Value::Object(merged);
            self.read(&Fields::new(&merged)?, theta).map_err(inside(&format!("{name}.{kind}")))
        };
        Ok([of(kinds[0], theta)?, of(kinds[1], local)?])
    }

    /// No parameters but the base.
    fn plain(&self, theta: f64) -> Result<Rope> {
        Ok(Rope { theta, scaling: RopeScaling::None, rotary_dim: self.rotary_dim(None)? })
    }

    /// One set of parameters; `theta` where it has none.
    fn read(&self, own: &Fields<'_>, theta: f64) -> Result<Rope> {
        let number = |field: &str| own.positive(field)?.ok_or_else(|| own.missing(field));
        let theta = own.positive("rope_theta")?.unwrap_or(theta);
        let rotary_dim = self.rotary_dim(own.positive("partial_rotary_factor")?)?;
        let (kind, old_kind) = (own.text("rope_type")?, own.text("type")?);
        if let (Some(kind), Some(old)) = (kind, old_kind)
            && kind != old
        {
            // versions 4 and 5 take different ones
            return Err(own.wrong("type", &format!("the rope_type '{kind}', or absent")));
        }
        let partial = self.family.forward.rotary == Rotary::Partial;
        let scaling = match kind.or(old_kind).unwrap_or("default") {
            "default" => RopeScaling::None,
            "longrope" => self.long_rope(own, rotary_dim)?,
            "yarn" | "su" if partial => self.long_rope(own, rotary_dim)?,
            _ if partial => return Err(own.wrong("rope_type", "one of default, longrope")),
            "linear" => RopeScaling::Linear { factor: number("factor")? },
            "dynamic" => {
                if rotary_dim == 2 {
                    let field = if kind.is_some() { "rope_type" } else { "type" };
                    let expected =
                        "another where a head rotates 2 values (the base grows by the power dim / (dim - 2))";
                    return Err(own.wrong(field, expected));
                }
                RopeScaling::Dynamic { factor: number("factor")?, context: self.max_position_embeddings }
            }
            "yarn" => self.yarn(own, theta, rotary_dim)?,
            "llama3" => {
                let (low, high) = (number("low_freq_factor")?, number("high_freq_factor")?);
                if low >= high {
                    return Err(own.wrong("low_freq_factor", "below high_freq_factor"));
                }
                RopeScaling::Llama3 {
                    factor: number("factor")?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_max_position_embeddings: self.original(own)?,
                }
            }
            _ => return Err(own.wrong("rope_type", "one of default, linear, dynamic, yarn, longrope, llama3")),
        };
        Ok(Rope { theta, scaling, rotary_dim })
    }

    /// `_compute_yarn_parameters`.
    fn yarn(&self, own: &Fields<'_>, theta: f64, rotary_dim: usize) -> Result<RopeScaling> {
        let factor = own.positive("factor")?.ok_or_else(|| own.missing("factor"))?;
        let original = self.original(own)?;
        let scale = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
        let attention_factor =
            match (own.positive("attention_factor")?, own.number("mscale")?, own.number("mscale_all_dim")?) {
                (Some(given), ..) => given,
                (None, Some(mscale), Some(all)) if mscale != 0.0 && all != 0.0 => scale(mscale) / scale(all),
                _ => scale(1.0),
            };
        let dim = rotary_dim as f64;
        let turning = |turns: f64| dim * (original / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
        let mut low = turning(own.positive("beta_fast")?.unwrap_or(32.0));
        let mut high = turning(own.positive("beta_slow")?.unwrap_or(1.0));
        if own.flag("truncate")?.unwrap_or(true) {
            (low, high) = (low.floor(), high.ceil());
        }
        let low = low.max(0.0);
        let high = high.min(dim - 1.0);
        let high = if low == high { high + 0.001 } else { high };
        Ok(RopeScaling::Yarn { factor, low, high, attention_factor })
    }

    /// `_compute_longrope_parameters`.
    fn long_rope(&self, own: &Fields<'_>, rotary_dim: usize) -> Result<RopeScaling> {
        let original = self.original(own)?;
        let factors = |field: &str| -> Result<Vec<f64>> {
            let values = own.get(field).ok_or_else(|| own.missing(field))?;
            let values = values.as_array().filter(|values| values.len() == rotary_dim / 2);
            let read = values
                .and_then(|values| values.iter().map(|v| v.as_f64().filter(|x| x.is_finite() && *x > 0.0)).collect());
            read.ok_or_else(|| own.wrong(field, &format!("a list of {} positive numbers", rotary_dim / 2)))
        };
        let long_factor = factors("long_factor")?;
        let factor = own.positive("factor")?.unwrap_or(self.max_position_embeddings as f64 / original);
        let default = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() };
        let attention_factor = own.positive("attention_factor")?.unwrap_or(default);
        if !attention_factor.is_finite() {
            let expected =
                format!("present: none follows from the factor {factor} and the original context {original}");
            return Err(own.wrong("attention_factor", &expected));
        }
        Ok(RopeScaling::LongRope {
            short_factor: factors("short_factor")?,
            long_factor,
            context: whole(original),
            attention_factor,
        })
    }

    /// Context of the model before it was stretched (`standardize_rope_params`: the field beside the parameters comes first).
    fn original(&self, own: &Fields<'_>) -> Result<f64> {
        let field = "original_max_position_embeddings";
        let beside = self.fields.positive(field)?.or(self.family.defaults.original_max_position_embeddings);
        Ok(beside.or(own.positive(field)?).unwrap_or(self.max_position_embeddings as f64))
    }

    /// Values of a head that are rotated: all of them, but for families that rotate a part.
    fn rotary_dim(&self, factor: Option<f64>) -> Result<usize> {
        let field = "partial_rotary_factor";
        let rotary = self.family.forward.rotary;
        let default = if let Rotary::Fraction(default) = rotary { default } else { 1.0 };
        let factor = factor.or(self.fields.positive(field)?).unwrap_or(default);
        let detail = |expected: &str| Error::Config {
            field: self.fields.name(field).to_owned(),
            detail: format!("must be {expected}; found {factor}"),
        };
        if !matches!(rotary, Rotary::Partial | Rotary::Fraction(_)) {
            let expected = format!("1.0 or absent: a {} rotates whole heads", self.family.model_type);
            return if factor == 1.0 { Ok(self.head_dim) } else { Err(detail(&expected)) };
        }
        let rotary_dim = whole(self.head_dim as f64 * factor);
        if (2..=self.head_dim).contains(&rotary_dim) && rotary_dim.is_multiple_of(2) {
            Ok(rotary_dim)
        } else {
            Err(detail(&format!("a part of head_dim {} that is even", self.head_dim)))
        }
    }
}

/// A positive number without its fraction.
fn whole(value: f64) -> usize {
    #[allow(clippy::cast_sign_loss)] // it has none
    let whole = value.max(0.0) as usize;
    whole
}

/// An error of a field, with the place of that field.
fn inside(name: &str) -> impl Fn(Error) -> Error {
    let name = name.to_owned();
    move |error| match error {
        Error::Config { field, detail } if !["partial_rotary_factor", "rotary_pct"].contains(&field.as_str()) => {
            Error::Config { field: format!("{name}.{field}"), detail }
        }
        other => other,
    }
}

/// The field that says how positions are rotated, and what it says.
pub(super) fn given<'a>(field: impl Fn(&str) -> Option<&'a Value>) -> Option<(&'static str, &'a Value)> {
    let names = ["rope_scaling", "rope_parameters"];
    let filled = |value: &&Value| value.as_object().is_none_or(|fields| !fields.is_empty());
    names.into_iter().find_map(|name| Some((name, field(name).filter(filled)?)))
}
