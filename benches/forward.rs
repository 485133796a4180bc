//! Prefill and decode of a whole model: on random weights of SmolLM2-135M's shape, but with as many K/V heads as query
//! heads, or on the checkpoint that `MQADAPT_BENCH_MODEL` names. `MQADAPT_BENCH_DTYPE`: `bfloat16` by default.
//!
//! `decode by layers`: time of a step against the number of MQA layers; `decode by heads`: against the number of K/V heads
//! of every layer. Throughput is in bytes read, so that it can be held against what the machine's memory gives.

use std::env;
use std::fs;
use std::path::Path;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use mqadapt_checkpoint::Checkpoint;
use mqadapt_core::{DType, ModelConfig, NoProgress, Plan};
use mqadapt_model::{LoadOptions, Model};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

const DEPTHS: [usize; 3] = [64, 2048, 8192];

/// The checkpoint, and the folder that it lives in if it was made here.
fn checkpoint() -> (Checkpoint, Option<tempfile::TempDir>) {
    if let Ok(path) = env::var("MQADAPT_BENCH_MODEL") {
        return (Checkpoint::open(Path::new(&path)).unwrap(), None);
    }
    let json = r#"{"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 9, "head_dim": 64,
        "tie_word_embeddings": true, "max_position_embeddings": 8192, "rope_theta": 100000.0}"#;
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("config.json"), json).unwrap();
    let tensors = ModelConfig::from_json(json).unwrap().tensors();
    let largest = tensors.iter().map(|tensor| tensor.shape.iter().product::<usize>()).max().unwrap_or(0);
    // bf16 of both signs around 2^-6: random enough for time, which does not depend on the values
    let values = (0..largest).map(|i| 0x3c00 | (i.wrapping_mul(0x9E37_79B9) >> 7) as u16 & 0x80ff);
    let bytes: Vec<u8> = values.flat_map(u16::to_le_bytes).collect();
    let views = tensors.into_iter().map(|tensor| {
        let len = tensor.shape.iter().product::<usize>() * 2;
        (tensor.name, TensorView::new(Dtype::BF16, tensor.shape, &bytes[..len]).unwrap())
    });
    safetensors::serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
    (Checkpoint::open(folder.path()).unwrap(), Some(folder))
}

fn load(checkpoint: &Checkpoint) -> Model {
    let dtype = env::var("MQADAPT_BENCH_DTYPE").map_or(DType::BF16, |name| DType::parse(&name).unwrap());
    let options = LoadOptions { dtype: Some(dtype), ..LoadOptions::default() };
    Model::load(checkpoint, &options, &NoProgress).unwrap()
}

fn decode(criterion: &mut Criterion, group: &str, plans: &[(usize, String)], model: &Model, checkpoint: &Checkpoint) {
    let mut group = criterion.benchmark_group(group);
    for (number, plan) in plans {
        let plan = Plan::parse(plan, checkpoint.config()).unwrap();
        let planned = model.with_plan(checkpoint, &plan, "mean", &mqadapt_compress::MergeOptions::default()).unwrap();
        for depth in DEPTHS {
            group.throughput(Throughput::Bytes(planned.bytes_per_step(depth)));
            group.bench_function(BenchmarkId::new(format!("depth {depth}"), number), |bencher| {
                bencher.iter_custom(|steps| {
                    let steps = usize::try_from(steps).unwrap();
                    let times = planned.measure_decode(depth, steps, 1, &NoProgress).unwrap();
                    Duration::from_secs_f64(times.iter().sum())
                });
            });
        }
    }
}

fn forward(criterion: &mut Criterion) {
    let (checkpoint, _folder) = checkpoint();
    let model = load(&checkpoint);
    let config = checkpoint.config();

    let mut group = criterion.benchmark_group("prefill");
    for tokens in [128, 512, 2048] {
        group.throughput(Throughput::Elements(tokens as u64));
        group.bench_function(BenchmarkId::from_parameter(tokens), |bencher| {
            bencher.iter_custom(|passes| {
                let passes = usize::try_from(passes).unwrap();
                Duration::from_secs_f64(model.measure_prefill(tokens, passes, &NoProgress).unwrap().iter().sum())
            });
        });
    }
    group.finish();

    let layers = config.num_hidden_layers;
    let mut plans = vec![(0, "keep".to_owned())];
    plans.extend([1, 2, 3].map(|third| layers * third / 3).map(|count| (count, format!("mqa:last{count}"))));
    decode(criterion, "decode by layers", &plans, &model, &checkpoint);

    let source = config.num_key_value_heads.iter().copied().min().unwrap_or(1);
    let counts = (1..=source).rev().filter(|count| config.num_key_value_heads.iter().all(|own| own % count == 0));
    let plans: Vec<_> = counts.map(|count| (count, format!("gqa{count}:all"))).collect();
    decode(criterion, "decode by heads", &plans, &model, &checkpoint);
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = forward
}
criterion_main!(benches);
