use std::fs;
use std::path::Path;

use safetensors::tensor::TensorView;
use tempfile::TempDir;

use super::*;

const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 8, "intermediate_size": 4, "vocab_size": 5,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": true}"#;

/// A tensor to be written: name, dtype, shape, bytes.
type Written = (String, safetensors::Dtype, Vec<usize>, Vec<u8>);

/// The tensors of [`CONFIG`], with the values 0, 1, 2, ... in f32.
fn tensors() -> Vec<Written> {
    let config = ModelConfig::from_json(CONFIG).unwrap();
    let written = |t: mqadapt_core::config::ExpectedTensor| {
        let values = 0..t.shape.iter().product::<usize>();
        let bytes = values.flat_map(|i| (i as f32).to_le_bytes()).collect();
        (t.name, safetensors::Dtype::F32, t.shape, bytes)
    };
    config.tensors().into_iter().map(written).collect()
}

fn write_shard(path: &Path, tensors: &[Written]) {
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// A folder with one file for every piece of `cut` tensors.
fn sharded(cut: usize) -> TempDir {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("config.json"), CONFIG).unwrap();
    let mut weight_map = Vec::new();
    for (number, tensors) in tensors().chunks(cut).enumerate() {
        let shard = format!("model-{number}-of-9.safetensors");
        write_shard(&folder.path().join(&shard), tensors);
        weight_map.extend(tensors.iter().map(|(name, ..)| format!("{name:?}: {shard:?}")));
    }
    let index = format!("{{\"weight_map\": {{{}}}}}", weight_map.join(","));
    fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    folder
}

fn single(tensors: &[Written]) -> TempDir {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("config.json"), CONFIG).unwrap();
    write_shard(&folder.path().join("model.safetensors"), tensors);
    folder
}

fn edit(folder: &Path, file: &str, from: &str, to: &str) {
    let path = folder.join(file);
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{text}");
    fs::write(path, text.replace(from, to)).unwrap();
}

fn problem(folder: &Path) -> Error {
    Checkpoint::open(folder).unwrap_err()
}

#[test]
fn reads_values_across_shards_and_dtypes() {
    let folder = sharded(5);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!((checkpoint.shards().len(), checkpoint.dtype()), (4, DType::F32));
    assert_eq!(checkpoint.tensors().len(), 20);
    for tensor in checkpoint.tensors() {
        let mut values = vec![0.0; tensor.len() - 1];
        checkpoint.read_f32(tensor, 1, &mut values).unwrap();
        assert!(values.iter().enumerate().all(|(i, v)| *v == (i + 1) as f32), "{}", tensor.name);
        let mut halves = vec![0; tensor.len() * 2];
        assert_eq!(checkpoint.read_as(tensor, DType::F16, 0, &mut halves).unwrap(), 0);
        assert!(
            halves
                .as_chunks::<2>()
                .0
                .iter()
                .enumerate()
                .all(|(i, b)| half::f16::from_le_bytes(*b).to_f32() == i as f32)
        );
    }
    let tensor = checkpoint.tensor("model.norm.weight").unwrap();
    assert!(matches!(checkpoint.read_f32(tensor, 1, &mut [0.0; 8]), Err(Error::OutOfRange { .. })));
    assert!(matches!(checkpoint.read_f32(tensor, usize::MAX, &mut [0.0; 8]), Err(Error::OutOfRange { .. })));
}

#[test]
fn is_send_and_sync() {
    fn check<T: Send + Sync>() {}
    check::<Checkpoint>();
}

#[test]
fn fingerprint_follows_content_not_place() {
    let (one, copy) = (sharded(5), sharded(5));
    let of = |folder: &TempDir| Checkpoint::open(folder.path()).unwrap().fingerprint().unwrap();
    assert_eq!(of(&one), of(&copy));
    edit(copy.path(), "config.json", "\"vocab_size\"", "\"rms_norm_eps\": 1e-5, \"vocab_size\"");
    assert_ne!(of(&one), of(&copy));
    let mut changed = tensors();
    changed[7].3[0] ^= 1;
    assert_ne!(of(&single(&tensors())), of(&single(&changed)));
}

#[test]
fn follows_symbolic_links() {
    let (source, folder) = (sharded(20), TempDir::new().unwrap());
    for entry in fs::read_dir(source.path()).unwrap() {
        let path = entry.unwrap().path();
        std::os::unix::fs::symlink(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    Checkpoint::open(folder.path()).unwrap();
}

#[test]
fn refuses_folders_that_are_no_checkpoint() {
    let folder = TempDir::new().unwrap();
    let path = folder.path();
    assert!(problem(&path.join("absent")).to_string().contains("no such file or folder"));
    assert!(problem(path).to_string().contains("config.json"));
    fs::write(path.join("config.json"), CONFIG).unwrap();
    assert!(problem(path).to_string().contains("neither model.safetensors nor"));
    edit(path, "config.json", "llama", "lama");
    assert!(matches!(problem(path), Error::Config { .. }));
}

#[test]
fn refuses_a_missing_shard() {
    let folder = sharded(5);
    fs::remove_file(folder.path().join("model-2-of-9.safetensors")).unwrap();
    assert!(matches!(problem(folder.path()), Error::MissingShard { shard, .. } if shard == "model-2-of-9.safetensors"));
}

#[test]
fn refuses_an_index_that_contradicts_the_shards() {
    let folder = sharded(5);
    let index = "model.safetensors.index.json";
    edit(folder.path(), index, "\"model.norm.weight\": ", "\"model.norm.other\": ");
    assert!(matches!(problem(folder.path()), Error::Misplaced { name, .. } if name == "model.norm.weight"));

    let folder = sharded(5);
    edit(folder.path(), index, "\"model.norm.weight\": \"model-3", "\"model.norm.weight\": \"model-0");
    assert!(problem(folder.path()).to_string().contains("says 'model-0-of-9.safetensors', but it is in 'model-3"));

    let folder = sharded(5);
    edit(
        folder.path(),
        index,
        "\"model.norm.weight\": ",
        "\"extra\": \"model-1-of-9.safetensors\", \"model.norm.weight\": ",
    );
    assert!(matches!(problem(folder.path()), Error::Misplaced { name, .. } if name == "extra"));
}

#[test]
fn names_a_shard_that_the_index_forgot() {
    let folder = sharded(5);
    let kept: Vec<String> = tensors()[..15]
        .iter()
        .enumerate()
        .map(|(at, (name, ..))| format!("{name:?}: \"model-{}-of-9.safetensors\"", at / 5))
        .collect();
    let index = format!("{{\"weight_map\": {{{}}}}}", kept.join(","));
    fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    assert!(problem(folder.path()).to_string().contains("'model-3-of-9.safetensors', which the index does not name"));
}

#[test]
fn refuses_a_missing_tensor() {
    let folder = single(&tensors()[1..]);
    assert!(matches!(problem(folder.path()), Error::MissingTensor { name, .. } if name == "model.embed_tokens.weight"));
}

#[test]
fn refuses_another_shape() {
    let mut tensors = tensors();
    tensors[3].2.reverse();
    let name = tensors[3].0.clone();
    assert!(matches!(problem(single(&tensors).path()), Error::Shape { name: found, .. } if found == name));
}

#[test]
fn refuses_weights_that_are_no_floats() {
    let mut tensors = tensors();
    tensors[3].1 = safetensors::Dtype::I32;
    let folder = single(&tensors);
    assert!(matches!(problem(folder.path()), Error::Dtype { found, .. } if found == "I32"));
}

#[test]
fn refuses_truncated_and_foreign_files() {
    let folder = single(&tensors());
    let path = folder.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    for len in [0, 7, 8, 100, whole.len() - 1] {
        fs::write(&path, &whole[..len]).unwrap();
        assert!(matches!(problem(folder.path()), Error::Header { .. }), "{len}");
    }
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(matches!(problem(folder.path()), Error::NotACheckpoint { .. }));
}

#[test]
fn a_file_that_shrinks_while_it_is_open_is_an_error() {
    let folder = single(&tensors());
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let last = checkpoint.tensors().last().unwrap();
    let file = fs::OpenOptions::new().write(true).open(folder.path().join("model.safetensors")).unwrap();
    file.set_len(last.offset + 4).unwrap();
    let mut out = vec![0.0; last.len()];
    assert!(matches!(checkpoint.read_f32(last, 0, &mut out), Err(Error::Shrunk { .. })));
}

#[test]
fn reads_plans_from_text_and_files() {
    let config = ModelConfig::from_json(CONFIG).unwrap();
    let folder = TempDir::new().unwrap();
    let json = folder.path().join("plan.json");
    let text = json.to_str().unwrap();
    assert!(matches!(crate::read_plan(text, &config), Err(Error::Io { .. })));
    fs::write(&json, r#"{"num_key_value_heads": [2, 1]}"#).unwrap();
    assert_eq!(crate::read_plan(text, &config).unwrap(), crate::read_plan("mqa:last1", &config).unwrap());
    fs::write(&json, b"{\"\xff").unwrap();
    assert!(matches!(crate::read_plan(text, &config), Err(Error::Config { .. })));
    assert!(matches!(crate::read_plan("gqa3:all", &config), Err(Error::Plan(_))));
}
