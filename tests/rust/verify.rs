//! Verification: what is right passes, each kind of damage is found and named.

use std::fs;
use std::path::Path;

use mqadapt_checkpoint::Checkpoint;
use mqadapt_compress::{MergeOptions, method};
use mqadapt_convert::{ConvertOptions, Error, MANIFEST_FILE, PARTIAL_SUFFIX, Verification, convert, verify};
use mqadapt_core::{DType, NoProgress, Plan};
use tempfile::TempDir;

use crate::synthetic::Synthetic;

fn converted(source: &Path, dst: &Path, name: &str, dtype: Option<DType>) {
    let checkpoint = Checkpoint::open(source).unwrap();
    let plan = Plan::parse("gqa2:1,3", checkpoint.config()).unwrap();
    let merge = MergeOptions { seed: 5, ..MergeOptions::default() };
    let options = ConvertOptions { dtype, ..ConvertOptions::new(method(name).unwrap(), merge) };
    convert(&checkpoint, dst, &plan, &options, &NoProgress).unwrap();
}

fn against(source: &Path, dst: &Path) -> Verification {
    verify(dst, Some(&Checkpoint::open(source).unwrap()), &NoProgress).unwrap()
}

/// Changes one byte of a tensor, and the manifest's checksum too if told.
fn damage(dst: &Path, tensor: &str, bits: u8, hide: bool) {
    let checkpoint = Checkpoint::open(dst).unwrap();
    let info = checkpoint.tensor(tensor).unwrap();
    let path = checkpoint.shards()[info.shard].path();
    let mut bytes = fs::read(path).unwrap();
    let before = format!("{:032x}", xxhash_rust::xxh3::xxh3_128(&bytes));
    bytes[info.offset as usize + 21] ^= bits;
    fs::write(path, &bytes).unwrap();
    if hide {
        let manifest = fs::read_to_string(dst.join(MANIFEST_FILE)).unwrap();
        let after = format!("{:032x}", xxhash_rust::xxh3::xxh3_128(&bytes));
        assert!(manifest.contains(&before));
        fs::write(dst.join(MANIFEST_FILE), manifest.replace(&before, &after)).unwrap();
    }
}

#[test]
fn what_is_right_passes() {
    for name in ["mean", "first", "random"] {
        for (per_shard, dtype) in [(0, None), (6, None), (6, Some(DType::F16)), (0, Some(DType::F32))] {
            let (source, out) = (Synthetic { per_shard, ..Synthetic::default() }.folder(), TempDir::new().unwrap());
            let dst = out.path().join("dst");
            converted(source.path(), &dst, name, dtype);
            let found = against(source.path(), &dst);
            assert_eq!(found.problems, [""; 0], "{name} {dtype:?}");
            assert_eq!((found.compared, found.not_compared), (found.tensors, 0));
        }
    }
}

#[test]
fn a_changed_byte_is_found() {
    let (source, out) = (Synthetic { per_shard: 6, ..Synthetic::default() }.folder(), TempDir::new().unwrap());
    let dst = out.path().join("dst");
    converted(source.path(), &dst, "mean", None);
    damage(&dst, "model.layers.0.mlp.up_proj.weight", 1, false);
    let found = verify(&dst, None, &NoProgress).unwrap();
    assert!(matches!(found.problems.as_slice(), [one] if one.contains("checksum")), "{:?}", found.problems);
}

#[test]
fn a_change_that_the_manifest_hides_is_found_against_the_source() {
    for (tensor, words) in [
        ("model.layers.0.mlp.up_proj.weight", "although the plan does not touch it"),
        ("model.layers.3.self_attn.v_proj.weight", "has 1 values that are not what 'random' gives"),
    ] {
        let (source, out) = (Synthetic::default().folder(), TempDir::new().unwrap());
        let dst = out.path().join("dst");
        converted(source.path(), &dst, "random", None);
        damage(&dst, tensor, 1, true);
        assert_eq!(verify(&dst, None, &NoProgress).unwrap().problems, [""; 0]);
        let found = against(source.path(), &dst);
        assert!(
            matches!(found.problems.as_slice(), [one] if one.contains(words) && one.contains(tensor)),
            "{:?}",
            found.problems
        );
    }
}

#[test]
fn values_that_are_not_finite_are_found() {
    let (source, out) = (Synthetic { dtype: DType::F32, ..Synthetic::default() }.folder(), TempDir::new().unwrap());
    let dst = out.path().join("dst");
    converted(source.path(), &dst, "mean", None);
    let checkpoint = Checkpoint::open(&dst).unwrap();
    let info = checkpoint.tensor("model.norm.weight").unwrap();
    let mut bytes = fs::read(dst.join("model.safetensors")).unwrap();
    bytes[info.offset as usize..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    bytes[info.offset as usize + 8..][..4].copy_from_slice(&f32::NEG_INFINITY.to_le_bytes());
    fs::write(dst.join("model.safetensors"), bytes).unwrap();
    let problems = verify(&dst, None, &NoProgress).unwrap().problems;
    assert!(
        problems.iter().any(|p| p.contains("'model.norm.weight' has 2 values that are not finite")),
        "{problems:?}"
    );
}

#[test]
fn another_source_is_noticed() {
    let (source, out) = (Synthetic::default().folder(), TempDir::new().unwrap());
    let other = Synthetic { scale: 2.0, ..Synthetic::default() }.folder();
    let dst = out.path().join("dst");
    converted(source.path(), &dst, "first", None);
    let problems = against(other.path(), &dst).problems;
    assert!(problems[0].contains("is not what was converted"), "{problems:?}");
}

#[test]
fn unfinished_and_foreign_folders_fail() {
    let (source, out) = (Synthetic::default().folder(), TempDir::new().unwrap());
    let dst = out.path().join("dst");
    let check = |folder: &Path| verify(folder, None, &NoProgress).unwrap_err();
    assert!(matches!(check(source.path()), Error::Manifest { .. }));
    fs::create_dir(out.path().join(format!("dst{PARTIAL_SUFFIX}"))).unwrap();
    assert!(matches!(check(&dst), Error::Unfinished { .. }));
    fs::remove_dir(out.path().join(format!("dst{PARTIAL_SUFFIX}"))).unwrap();
    converted(source.path(), &dst, "first", None);
    fs::write(dst.join("model.safetensors.partial"), "").unwrap();
    assert!(matches!(check(&dst), Error::Unfinished { .. }));
}

#[test]
fn a_manifest_that_contradicts_the_folder_is_found() {
    let (source, out) = (Synthetic::default().folder(), TempDir::new().unwrap());
    let dst = out.path().join("dst");
    converted(source.path(), &dst, "first", None);
    let text = fs::read_to_string(dst.join(MANIFEST_FILE)).unwrap();
    let mut manifest: serde_json::Value = serde_json::from_str(&text).unwrap();
    manifest["num_key_value_heads_after"][1] = 4.into();
    manifest["shards"][0]["bytes"] = 7.into();
    fs::write(dst.join(MANIFEST_FILE), manifest.to_string()).unwrap();
    let problems = verify(&dst, None, &NoProgress).unwrap().problems;
    assert!(problems[0].contains("num_key_value_heads") && problems[1].contains("lists the files"), "{problems:?}");
    for broken in [
        "",
        "{}",
        "[1]",
        "\u{0}",
        &text[..text.len() / 2],
        &text.replace("\"format_version\": 1", "\"format_version\": 2"),
    ] {
        fs::write(dst.join(MANIFEST_FILE), broken).unwrap();
        assert!(matches!(verify(&dst, None, &NoProgress), Err(Error::Manifest { .. })), "{broken}");
    }
}

#[test]
fn a_manifest_with_names_or_figures_that_cannot_be_is_found() {
    let (source, out) = (Synthetic::default().folder(), TempDir::new().unwrap());
    let dst = out.path().join("dst");
    converted(source.path(), &dst, "mean", None);
    let text = fs::read_to_string(dst.join(MANIFEST_FILE)).unwrap();
    for (field, value, words) in [
        ("/method", "better-mean".into(), "says method \"better-mean\", expected one of mean"),
        ("/dtype", "float8".into(), "says dtype \"float8\""),
        ("/plan/num_key_value_heads/0", 4.into(), "says plan.num_key_value_heads [4, 2, 8, 2]"),
        ("/relative_error/0", 0.5.into(), "says relative_error 0.5 of layer 0, expected 0"),
        ("/relative_error/1", (-1).into(), "says relative_error -1 of layer 1"),
        ("/kv_bytes_per_token_after", 5.into(), "says kv_bytes_per_token_after 5"),
        ("/parameters_after", 5.into(), "says parameters_after 5"),
        ("/num_key_value_heads_before/0", 4.into(), "says num_key_value_heads_before [4, 8, 8, 8]"),
    ] {
        let mut manifest: serde_json::Value = serde_json::from_str(&text).unwrap();
        *manifest.pointer_mut(field).unwrap() = value;
        fs::write(dst.join(MANIFEST_FILE), manifest.to_string()).unwrap();
        let problems = against(source.path(), &dst).problems;
        assert!(problems.iter().any(|problem| problem.contains(words)), "{field}: {problems:?}");
    }
}
