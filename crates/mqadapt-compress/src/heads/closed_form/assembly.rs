//! The tensors of a merged layer. In: solutions of its groups and the projections of the source; out: the projections of
//! fewer K/V heads.

use faer::{Mat, MatRef};
use mqadapt_core::{AttentionShape, DType};

use super::group::query_heads;
use super::grouping::Groups;
use super::keys::KeySolution;
use super::values::ValueSolution;
use crate::algebra::count;
use crate::layer::{LayerWeights, affine_head, output_head, round, round_to, store_affine_head, store_output_head};

/// A source layer, and the groups of its K/V heads.
#[derive(Clone, Copy)]
pub(crate) struct Assembly<'a> {
    pub(crate) weights: &'a LayerWeights,
    pub(crate) geometry: &'a AttentionShape,
    pub(crate) groups: &'a Groups,
    /// What the merged weights are stored in.
    pub(crate) dtype: DType,
}

impl Assembly<'_> {
    /// A merged layer with its values and `o_proj`; keys and queries still to be written.
    pub(crate) fn with_values(&self, values: &[ValueSolution]) -> LayerWeights {
        let (geometry, weights) = (self.geometry, self.weights);
        let (d, hidden, heads) = (geometry.head_dim, geometry.hidden_size, geometry.num_attention_heads);
        let mut merged = self.empty();
        let mut to = 0;
        for (i, members) in self.groups.iter().enumerate() {
            let v = mix(values[i].rows.as_ref(), members, &weights.v_proj, weights.v_proj_bias.as_deref(), d, hidden);
            store_affine_head(v.as_ref(), i, hidden, &mut merged.v_proj, merged.v_proj_bias.as_mut());
            for (map, from) in values[i].maps.iter().zip(query_heads(members, geometry)) {
                let o = output_head(&weights.o_proj, from, heads, d, hidden) * map;
                store_output_head(o.as_ref(), to, heads, &mut merged.o_proj);
                to += 1;
            }
        }
        merged.round_to(self.dtype);
        merged
    }

    /// A merged layer of zeros.
    pub(crate) fn empty(&self) -> LayerWeights {
        let (geometry, weights) = (self.geometry, self.weights);
        let (d, hidden, heads) = (geometry.head_dim, geometry.hidden_size, geometry.num_attention_heads);
        let rows = self.groups.len() * d;
        LayerWeights {
            q_proj: vec![0.0; heads * d * hidden],
            k_proj: vec![0.0; rows * hidden],
            v_proj: vec![0.0; rows * hidden],
            o_proj: vec![0.0; hidden * heads * d],
            q_proj_bias: weights.q_proj_bias.as_ref().map(|b| vec![0.0; b.len()]),
            k_proj_bias: weights.k_proj_bias.as_ref().map(|_| vec![0.0; rows]),
            v_proj_bias: weights.v_proj_bias.as_ref().map(|_| vec![0.0; rows]),
            k_norm: weights.k_norm.as_ref().map(|_| vec![0.0; rows]),
        }
    }

    /// Keys and queries of a layer that [`Self::with_values`] made, rounded as they are stored.
    pub(crate) fn write_keys(&self, keys: &[KeySolution], merged: &mut LayerWeights) {
        self.write_exact_keys(keys, merged);
        let optional = [&mut merged.q_proj_bias, &mut merged.k_proj_bias, &mut merged.k_norm].into_iter().flatten();
        for values in [&mut merged.q_proj, &mut merged.k_proj].into_iter().chain(optional) {
            round_to(values, self.dtype);
        }
    }

    /// The same before rounding.
    pub(crate) fn write_exact_keys(&self, keys: &[KeySolution], merged: &mut LayerWeights) {
        let (geometry, weights) = (self.geometry, self.weights);
        let (d, hidden) = (geometry.head_dim, geometry.hidden_size);
        let mut to = 0;
        for (i, members) in self.groups.iter().enumerate() {
            let k = mix(keys[i].rows.as_ref(), members, &weights.k_proj, weights.k_proj_bias.as_deref(), d, hidden);
            store_affine_head(k.as_ref(), i, hidden, &mut merged.k_proj, merged.k_proj_bias.as_mut());
            if let (Some(source), Some(norm)) = (&weights.k_norm, &mut merged.k_norm) {
                let mean = mean_weight(source, members, d);
                norm[i * d..(i + 1) * d].iter_mut().zip(mean).for_each(|(to, w)| *to = round(keys[i].norm_scale * w));
            }
            for (map, from) in keys[i].maps.iter().zip(query_heads(members, geometry)) {
                let q = map * affine_head(&weights.q_proj, weights.q_proj_bias.as_deref(), from, d, hidden);
                store_affine_head(q.as_ref(), to, hidden, &mut merged.q_proj, merged.q_proj_bias.as_mut());
                to += 1;
            }
        }
    }

    /// The gradient by the mixes of [`Self::write_exact_keys`], from that by the tensors that it writes.
    pub(crate) fn keys_gradient(&self, by: &LayerWeights) -> Vec<KeySolution> {
        let (d, hidden) = (self.geometry.head_dim, self.geometry.hidden_size);
        let (q, q_bias) = (&self.weights.q_proj, self.weights.q_proj_bias.as_deref());
        let (k, k_bias) = (&self.weights.k_proj, self.weights.k_proj_bias.as_deref());
        let mut to = 0;
        let of_group = |(i, members): (usize, &Vec<usize>)| {
            let by_k = affine_head(&by.k_proj, by.k_proj_bias.as_deref(), i, d, hidden);
            let mut rows = Mat::<f64>::zeros(d, members.len() * d);
            for (slot, head) in members.iter().enumerate() {
                let block = &by_k * affine_head(k, k_bias, *head, d, hidden).transpose();
                rows.subcols_mut(slot * d, d).copy_from(&block);
            }
            let mut map = |from| {
                let by_q = affine_head(&by.q_proj, by.q_proj_bias.as_deref(), to, d, hidden);
                to += 1;
                by_q * affine_head(q, q_bias, from, d, hidden).transpose()
            };
            let maps = query_heads(members, self.geometry).into_iter().map(&mut map).collect();
            let by_norm = self.weights.k_norm.iter().zip(&by.k_norm).map(|(source, by)| {
                let by = by[i * d..(i + 1) * d].iter();
                mean_weight(source, members, d).iter().zip(by).map(|(w, by)| w * f64::from(*by)).sum::<f64>()
            });
            KeySolution { rows, maps, norm_scale: by_norm.sum() }
        };
        self.groups.iter().enumerate().map(of_group).collect()
    }
}

/// The mean of the members' parts of a norm's weight: `[head_dim]`; that of a norm of each head is the same for all.
pub(crate) fn mean_weight(weight: &[f32], members: &[usize], d: usize) -> Vec<f64> {
    let of = |g: usize, i: usize| f64::from(weight[(g * d + i) % weight.len()]);
    (0..d).map(|i| members.iter().map(|g| of(*g, i)).sum::<f64>() / count(members.len())).collect()
}

/// `rows * [head; head; ...]` of the members' projections, `[head_dim, hidden_size (+ 1)]`.
fn mix(
    rows: MatRef<'_, f64>,
    members: &[usize],
    weight: &[f32],
    bias: Option<&[f32]>,
    d: usize,
    hidden: usize,
) -> Mat<f64> {
    let mut sum = Mat::<f64>::zeros(d, hidden + usize::from(bias.is_some()));
    for (slot, head) in members.iter().enumerate() {
        sum += rows.subcols(slot * d, d) * affine_head(weight, bias, *head, d, hidden);
    }
    sum
}
