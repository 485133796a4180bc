//! Keys of one group: fast pairs by their own complex mix, slow dims together.

use faer::Mat;

use super::group::Group;
use super::pairs::PairMix;
use super::slow::{slow_dims, solve_slow};
use crate::Error;
use crate::statistics::Moment;

/// The merged keys of a group.
#[derive(Clone)]
pub(crate) struct KeySolution {
    /// `k' = rows * stacked keys`, `[head_dim, members * head_dim]`.
    pub(crate) rows: Mat<f64>,
    /// `q' = maps[i] * q`, `[head_dim, head_dim]` per query head.
    pub(crate) maps: Vec<Mat<f64>>,
    /// What the group's mean weight of a norm over all heads is multiplied by; 1 where there is none.
    pub(crate) norm_scale: f64,
}

/// Solves a group with `cut` fast pairs.
pub(crate) fn solve_keys(group: &Group<'_>, cut: usize) -> Result<KeySolution, Error> {
    let (d, pairs) = (group.geometry.head_dim, group.geometry.rotary_pairs());
    let r = group.geometry.num_key_value_groups();
    let heads = group.query_heads();
    let query: Vec<Mat<f64>> = heads.iter().map(|h| group.statistics.own(Moment::Query, *h)).collect();
    let mut rows = Mat::<f64>::zeros(d, group.members.len() * d);
    let mut maps: Vec<Mat<f64>> = heads.iter().map(|_| Mat::zeros(d, d)).collect();
    for j in 0..cut {
        let energy: Vec<f64> = query.iter().map(|q| (q[(j, j)] + q[(j + pairs, j + pairs)]).max(0.0)).collect();
        let blocks: Vec<_> = heads.iter().map(|h| group.rotated_pair(*h, j)).collect();
        let mix = PairMix::solve(&energy, &blocks, r)?;
        mix.store(&mut rows, j, j + pairs, j, pairs, d);
        for (i, map) in maps.iter_mut().enumerate() {
            // q' = conj(c) q
            let c = mix.read_out(&blocks[i], group.slot(i));
            map[(j, j)] = c.re;
            map[(j, j + pairs)] = c.im;
            map[(j + pairs, j)] = -c.im;
            map[(j + pairs, j + pairs)] = c.re;
        }
    }
    let dims = slow_dims(cut, pairs, d);
    if !dims.is_empty() {
        let n = dims.len();
        let slow = solve_slow(group, cut)?;
        for (i, &slot) in dims.iter().enumerate() {
            for j in 0..slow.rows.ncols() {
                rows[(slot, j / n * d + dims[j % n])] = slow.rows[(i, j)];
            }
        }
        for (map, b) in maps.iter_mut().zip(&slow.read_outs) {
            for (i, &slot) in dims.iter().enumerate() {
                for (j, &from) in dims.iter().enumerate() {
                    map[(slot, from)] = b[(j, i)]; // q' = BT q
                }
            }
        }
    }
    Ok(KeySolution { rows, maps, norm_scale: 1.0 })
}
