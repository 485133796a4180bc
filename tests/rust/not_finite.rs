//! Weights that are infinite or not a number: refused where heads are merged, copied and counted elsewhere.

use std::fs;
use std::path::Path;

use mqadapt_checkpoint::{Checkpoint, Error as CheckpointError};
use mqadapt_compress::{MergeOptions, method};
use mqadapt_convert::{ConversionReport, ConvertOptions, Error, Result, convert, verify};
use mqadapt_core::{DType, NoProgress, Plan};
use tempfile::TempDir;

use crate::synthetic::{Synthetic, values};

/// A source of float32 with other values in some places.
fn source(places: &[(&str, usize, f32)]) -> TempDir {
    let folder = Synthetic { dtype: DType::F32, per_shard: 9, ..Synthetic::default() }.folder();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    for &(name, index, value) in places {
        let info = checkpoint.tensor(name).unwrap();
        let path = checkpoint.shards()[info.shard].path();
        let mut bytes = fs::read(path).unwrap();
        bytes[info.offset as usize + 4 * index..][..4].copy_from_slice(&value.to_le_bytes());
        fs::write(path, bytes).unwrap();
    }
    folder
}

fn run(source: &Path, dst: &Path, name: &str, dtype: Option<DType>) -> Result<ConversionReport> {
    let checkpoint = Checkpoint::open(source)?;
    let plan = Plan::parse("gqa2:1", checkpoint.config()).unwrap();
    let options = ConvertOptions { dtype, ..ConvertOptions::new(method(name).unwrap(), MergeOptions::default()) };
    convert(&checkpoint, dst, &plan, &options, &NoProgress)
}

#[test]
fn a_merged_tensor_is_refused_by_name_whatever_the_method() {
    let (k_proj, v_proj) = ("model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight");
    let out = TempDir::new().unwrap();
    let dst = out.path().join("dst");
    for (tensor, index, value) in [(k_proj, 0, f32::NAN), (v_proj, 80 * 24 - 1, f32::INFINITY)] {
        let source = source(&[(tensor, index, value)]);
        for name in ["mean", "first", "random"] {
            for dtype in [None, Some(DType::BF16)] {
                let error = run(source.path(), &dst, name, dtype).unwrap_err();
                let text = error.to_string();
                let expected = Error::Checkpoint(CheckpointError::NotFinite {
                    path: source.path().join("model-00001-of-00005.safetensors"),
                    name: tensor.to_owned(),
                    value,
                    at: vec![index / 24, index % 24],
                })
                .to_string();
                let behind = |text: &str| text.split_once(": tensor").map(|(_, text)| text.to_owned());
                assert_eq!(behind(&text), behind(&expected));
                assert!(text.contains("leaves layer 1 as it is"), "{text}");
                assert!(!dst.exists());
            }
        }
    }
}

#[test]
fn a_copied_tensor_stays_as_it_is_and_is_counted() {
    let places = [
        ("model.norm.weight", 3, f32::NAN),
        ("model.layers.0.self_attn.k_proj.weight", 700, f32::INFINITY),
        ("model.layers.0.self_attn.k_proj.weight", 7, f32::NEG_INFINITY),
    ];
    let (folder, out) = (source(&places), TempDir::new().unwrap());
    for (name, dtype) in [("stored", None), ("cast", Some(DType::BF16))] {
        let dst = out.path().join(name);
        let report = run(folder.path(), &dst, "mean", dtype).unwrap();
        let found: Vec<_> = report.not_finite.iter().map(|(name, count)| (name.as_str(), *count)).collect();
        assert_eq!(found, [("model.layers.0.self_attn.k_proj.weight", 2), ("model.norm.weight", 1)]);
        let after = Checkpoint::open(&dst).unwrap();
        assert!(values(&after, "model.norm.weight")[3].is_nan());
        assert_eq!(values(&after, "model.layers.0.self_attn.k_proj.weight")[7], f32::NEG_INFINITY);
        let problems = verify(&dst, None, &NoProgress).unwrap().problems;
        assert_eq!(problems.len(), 2, "{problems:?}");
    }
    assert!(run(source(&[]).path(), &out.path().join("clean"), "mean", None).unwrap().not_finite.is_empty());
}

#[test]
fn a_source_that_cannot_have_given_a_tensor_is_a_problem() {
    let out = TempDir::new().unwrap();
    let dst = out.path().join("dst");
    run(source(&[]).path(), &dst, "mean", None).unwrap();
    let broken = source(&[("model.layers.1.self_attn.k_proj.weight", 100, f32::NAN)]);
    let problems = verify(&dst, Some(&Checkpoint::open(broken.path()).unwrap()), &NoProgress).unwrap().problems;
    assert!(
        problems.iter().any(|problem| problem.contains("k_proj.weight' cannot be what the source gives")),
        "{problems:?}"
    );
}
