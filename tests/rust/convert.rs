//! Conversion: what is written, what is kept, what is refused.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use half::{bf16, f16};
use mqadapt_calibrate::{CalibratedLayers, CalibratedMerge, Calibration, CalibrationOptions};
use mqadapt_checkpoint::Checkpoint;
use mqadapt_compress::{LayerError, LayerMethod, LayerWeights, MergeOptions, MergedLayer, method};
use mqadapt_convert::{
    ConversionReport, ConvertOptions, Error, MANIFEST_FILE, Manifest, PARTIAL_SUFFIX, Result, convert, convert_layers,
};
use mqadapt_core::{DType, Interrupted, LayerCache, NoProgress, Plan, Progress};
use tempfile::TempDir;

use crate::synthetic::{CONFIG, Synthetic, files, values};

fn options(name: &str) -> ConvertOptions {
    ConvertOptions::new(method(name).unwrap(), MergeOptions::default())
}

fn run(src: &Path, dst: &Path, plan: &str, options: &ConvertOptions) -> Result<ConversionReport> {
    let checkpoint = Checkpoint::open(src)?;
    let plan = Plan::parse(plan, checkpoint.config()).unwrap();
    convert(&checkpoint, dst, &plan, options, &NoProgress)
}

/// What the mean of contiguous groups is, computed in the plainest way.
fn mean(source: &[f32], heads: usize, target: usize) -> Vec<f32> {
    let head = source.len() / heads;
    let group = heads / target;
    (0..target * head)
        .map(|at| {
            let (own, inside) = (at / head, at % head);
            let sum: f64 = (0..group).map(|member| f64::from(source[(own * group + member) * head + inside])).sum();
            (sum / group as f64) as f32
        })
        .collect()
}

#[test]
fn merges_what_the_plan_says_and_copies_the_rest() {
    for per_shard in [0, 7] {
        let (source, out) = (Synthetic { per_shard, ..Synthetic::default() }.folder(), TempDir::new().unwrap());
        let dst = out.path().join("made/for/it");
        let report = run(source.path(), &dst, "gqa2:1,2; mqa:3", &options("mean")).unwrap();
        let (before, after) = (Checkpoint::open(source.path()).unwrap(), Checkpoint::open(&dst).unwrap());
        assert_eq!(after.config().num_key_value_heads, [8, 2, 2, 1]);
        assert_eq!(after.shards().len(), before.shards().len());
        let names = |checkpoint: &Checkpoint| {
            checkpoint.tensors().iter().map(|t| (t.name.clone(), t.shard)).collect::<Vec<_>>()
        };
        assert_eq!(names(&after), names(&before), "order and sharding are the source's");
        for tensor in before.tensors() {
            let source = values(&before, &tensor.name);
            let heads = ["1.", "2.", "3."].iter().zip([2, 2, 1]).find_map(|(layer, heads)| {
                let kv = tensor.name.contains("k_proj") || tensor.name.contains("v_proj");
                (kv && tensor.name.contains(&format!("layers.{layer}"))).then_some(heads)
            });
            let expected = match heads {
                Some(heads) => mean(&source, 8, heads).iter().map(|v| bf16::from_f32(*v).to_f32()).collect(),
                None => source,
            };
            assert_eq!(values(&after, &tensor.name), expected, "{}", tensor.name);
        }
        for name in ["tokenizer.json", "LICENSE", "additional_chat_templates/tool.jinja"] {
            assert_eq!(fs::read(dst.join(name)).unwrap(), fs::read(source.path().join(name)).unwrap());
        }
        assert!(!dst.join("pytorch_model.bin").exists());
        assert!(dst.join("modeling_mqadapt.py").exists(), "layers differ");
        let written: u64 = files(&dst).iter().map(|(_, bytes)| bytes.len() as u64).sum();
        assert_eq!(report.bytes_written, written);
        let in_tensors: u64 = before.tensors().iter().map(|tensor| tensor.bytes).sum();
        assert_eq!(report.bytes_read, in_tensors);
        assert_eq!(files(out.path()).len(), files(&dst).len(), "nothing lies beside it");
    }
}

#[test]
fn the_manifest_says_what_was_done() {
    let (source, out) = (Synthetic::default().folder(), TempDir::new().unwrap());
    let dst = out.path().join("dst");
    let report = run(source.path(), &dst, "mqa:last2", &options("first")).unwrap();
    let manifest = Manifest::read(&dst).unwrap().unwrap();
    assert_eq!(manifest, report.manifest);
    assert_eq!((manifest.method.as_str(), manifest.dtype.as_str()), ("first", "bfloat16"));
    assert_eq!(manifest.num_key_value_heads_before, [8; 4]);
    assert_eq!(manifest.num_key_value_heads_after, [8, 8, 1, 1]);
    assert_eq!(manifest.kv_bytes_per_token_before, 4 * 2 * 8 * 10 * 2);
    assert_eq!(manifest.kv_bytes_per_token_after, (2 * 8 + 2) * 2 * 10 * 2);
    assert_eq!(manifest.parameters_before - manifest.parameters_after, 2 * 2 * 7 * 10 * 24);
    assert_eq!(manifest.relative_error[..2], [0.0, 0.0]);
    // of eight independent heads, seven are replaced by an independent one: sqrt(7/8 * 2)
    assert!((manifest.relative_error[2] - 1.32).abs() < 0.03, "{:?}", manifest.relative_error);
    let bytes = fs::read(dst.join("model.safetensors")).unwrap();
    assert_eq!(manifest.shards[0].bytes, bytes.len() as u64);
    assert_eq!(manifest.shards[0].xxh3_128, format!("{:032x}", xxhash_rust::xxh3::xxh3_128(&bytes)));
    assert_eq!(manifest.source.fingerprint, Checkpoint::open(source.path()).unwrap().fingerprint().unwrap());
}

#[test]
fn equal_conversions_write_equal_bytes() {
    let (source, out) = (Synthetic { per_shard: 5, ..Synthetic::default() }.folder(), TempDir::new().unwrap());
    let mut options = options("random");
    options.merge.seed = 9;
    let of = |name: &str, options: &ConvertOptions| {
        run(source.path(), &out.path().join(name), "gqa4:all", options).unwrap();
        files(&out.path().join(name))
    };
    let one = of("one", &options);
    options.max_memory = 1;
    options.sync = false;
    assert_eq!(of("two", &options), one);
    options.merge.seed = 10;
    assert_ne!(of("three", &options), one);
}

#[test]
fn converts_dtypes_with_one_rounding() {
    for (stored, dtype) in
        [(DType::BF16, DType::F16), (DType::F16, DType::BF16), (DType::F32, DType::F16), (DType::BF16, DType::F32)]
    {
        let (source, out) = (Synthetic { dtype: stored, ..Synthetic::default() }.folder(), TempDir::new().unwrap());
        let dst = out.path().join("dst");
        run(source.path(), &dst, "mqa:0", &ConvertOptions { dtype: Some(dtype), ..options("mean") }).unwrap();
        let (before, after) = (Checkpoint::open(source.path()).unwrap(), Checkpoint::open(&dst).unwrap());
        assert_eq!((after.dtype(), after.config().dtype), (dtype, Some(dtype)));
        let rounded = |v: &f32| match dtype {
            DType::F32 => *v,
            DType::F16 => f16::from_f32(*v).to_f32(),
            DType::BF16 => bf16::from_f32(*v).to_f32(),
        };
        let k_proj = "model.layers.0.self_attn.k_proj.weight";
        for tensor in
            before.tensors().iter().filter(|tensor| tensor.name != k_proj && !tensor.name.contains("0.self_attn.v"))
        {
            let expected: Vec<f32> = values(&before, &tensor.name).iter().map(rounded).collect();
            assert_eq!(values(&after, &tensor.name), expected, "{}", tensor.name);
        }
        let expected: Vec<f32> = mean(&values(&before, k_proj), 8, 1).iter().map(rounded).collect();
        assert_eq!(values(&after, k_proj), expected);
    }
}

#[test]
fn values_too_large_for_f16_are_an_error() {
    let (source, out) = (Synthetic { scale: 1e6, ..Synthetic::default() }.folder(), TempDir::new().unwrap());
    let dst = out.path().join("dst");
    let error =
        run(source.path(), &dst, "keep", &ConvertOptions { dtype: Some(DType::F16), ..options("mean") }).unwrap_err();
    assert!(matches!(error, Error::Overflow { count, .. } if count > 0), "{error}");
    assert!(files(out.path()).is_empty());
}

#[test]
fn cuts_into_shards_of_a_size() {
    let (source, out) = (Synthetic::default().folder(), TempDir::new().unwrap());
    let dst = out.path().join("dst");
    run(source.path(), &dst, "keep", &ConvertOptions { max_shard_size: Some(12_000), ..options("mean") }).unwrap();
    let (before, after) = (Checkpoint::open(source.path()).unwrap(), Checkpoint::open(&dst).unwrap());
    assert!(after.shards().len() > 3);
    for (number, shard) in after.shards().iter().enumerate() {
        assert_eq!(shard.name(), format!("model-{:05}-of-{:05}.safetensors", number + 1, after.shards().len()));
        let bytes: u64 = after.tensors().iter().filter(|t| t.shard == number).map(|t| t.bytes).sum();
        assert!(bytes <= 12_000);
        assert_eq!(shard.metadata().unwrap(), [("format".to_owned(), "pt".to_owned())]);
    }
    for tensor in before.tensors() {
        assert_eq!(values(&before, &tensor.name), values(&after, &tensor.name));
    }
    // and back into one
    let whole = out.path().join("whole");
    run(&dst, &whole, "keep", &ConvertOptions { max_shard_size: Some(1 << 30), ..options("mean") }).unwrap();
    assert_eq!(
        fs::read(whole.join("model.safetensors")).unwrap(),
        fs::read(source.path().join("model.safetensors")).unwrap()
    );
}

#[test]
fn a_converted_checkpoint_converts_again() {
    let (source, out) = (Synthetic::default().folder(), TempDir::new().unwrap());
    let (half, then, once) = (out.path().join("half"), out.path().join("then"), out.path().join("once"));
    run(source.path(), &half, "gqa4:0,1", &options("first")).unwrap();
    assert!(half.join("modeling_mqadapt.py").exists());
    run(&half, &then, "mqa:all", &options("first")).unwrap();
    run(source.path(), &once, "mqa:all", &options("first")).unwrap();
    assert!(!then.join("modeling_mqadapt.py").exists(), "all layers are alike");
    for name in ["model.safetensors", "config.json"] {
        assert_eq!(fs::read(then.join(name)).unwrap(), fs::read(once.join(name)).unwrap(), "{name}");
    }
}

#[test]
fn refuses_outputs_that_would_lose_something() {
    let (source, out) = (Synthetic::default().folder(), TempDir::new().unwrap());
    let before = files(source.path());
    let overwrite = ConvertOptions { overwrite: true, ..options("mean") };
    let refused = |dst: &Path, options: &ConvertOptions| run(source.path(), dst, "mqa:all", options).unwrap_err();

    assert!(matches!(refused(source.path(), &options("mean")), Error::InPlace { .. }));
    assert!(matches!(refused(source.path(), &overwrite), Error::InPlace { .. }));
    assert!(matches!(refused(source.path().parent().unwrap(), &overwrite), Error::InPlace { .. }));
    assert!(matches!(refused(out.path(), &options("mean")), Error::Exists { .. }));
    let precious = out.path().join("precious");
    fs::create_dir(&precious).unwrap();
    fs::write(precious.join("thesis.txt"), "years of work").unwrap();
    assert!(matches!(refused(&precious, &overwrite), Error::NotReplaceable { .. }));
    fs::write(out.path().join("file"), "").unwrap();
    assert!(matches!(refused(&out.path().join("file"), &overwrite), Error::NotReplaceable { .. }));
    assert!(matches!(refused(&out.path().join("file/below"), &options("mean")), Error::Io { .. }));
    assert_eq!(files(source.path()), before);
    assert_eq!(files(out.path()).len(), 2);
}

#[test]
fn overwrite_replaces_a_checkpoint_whole() {
    let (source, out) = (Synthetic::default().folder(), TempDir::new().unwrap());
    let (dst, fresh) = (out.path().join("dst"), out.path().join("fresh"));
    run(source.path(), &dst, "mqa:0", &options("mean")).unwrap();
    assert!(matches!(run(source.path(), &dst, "mqa:all", &options("mean")), Err(Error::Exists { .. })));
    run(source.path(), &dst, "mqa:all", &ConvertOptions { overwrite: true, ..options("mean") }).unwrap();
    run(source.path(), &fresh, "mqa:all", &options("mean")).unwrap();
    assert_eq!(files(&dst), files(&fresh));
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 2);
}

/// Stops after so many bytes.
struct StopAt(u64, AtomicU64);

impl Progress for StopAt {
    fn advance(&self, phase: &str, done: u64, total: u64) -> std::result::Result<(), Interrupted> {
        assert!(phase == "convert" && done <= total, "{phase} {done} {total}");
        self.1.fetch_max(done, Ordering::Relaxed);
        if done >= self.0 { Err(Interrupted) } else { Ok(()) }
    }
}

#[test]
fn an_interrupt_leaves_nothing_or_something_resumable() {
    let (source, out) = (Synthetic { per_shard: 6, ..Synthetic::default() }.folder(), TempDir::new().unwrap());
    let (dst, whole) = (out.path().join("dst"), out.path().join("whole"));
    let checkpoint = Checkpoint::open(source.path()).unwrap();
    let plan = Plan::parse("gqa2:all", checkpoint.config()).unwrap();
    let stopped = |options: &ConvertOptions, at| {
        let error = convert(&checkpoint, &dst, &plan, options, &StopAt(at, AtomicU64::new(0))).unwrap_err();
        assert!(matches!(error, Error::Interrupted(_)), "{error}");
        assert!(!dst.exists());
    };
    stopped(&options("mean"), 20_000);
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0);

    let resume = ConvertOptions { resume: true, ..options("mean") };
    for at in [1, 5_000, 20_000, 30_000] {
        stopped(&resume, at);
    }
    let partial = out.path().join(format!("dst{PARTIAL_SUFFIX}"));
    assert!(partial.exists() && !partial.join("config.json").exists() && !partial.join(MANIFEST_FILE).exists());
    let again = |options: &ConvertOptions| convert(&checkpoint, &dst, &plan, options, &NoProgress);
    assert!(matches!(again(&options("mean")), Err(Error::Unfinished { .. })));
    let other = again(&ConvertOptions { resume: true, ..options("first") }).unwrap_err();
    assert!(other.to_string().contains("its method is \"mean\", not \"first\""), "{other}");
    again(&resume).unwrap();
    convert(&checkpoint, &whole, &plan, &options("mean"), &NoProgress).unwrap();
    assert_eq!(files(&dst), files(&whole));
    assert!(!partial.exists());
}

#[test]
fn a_source_that_changes_is_noticed() {
    let (source, out) = (Synthetic::default().folder(), TempDir::new().unwrap());
    let checkpoint = Checkpoint::open(source.path()).unwrap();
    let path = source.path().join("model.safetensors");
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    let plan = Plan::keep(checkpoint.config());
    let dst = out.path().join("dst");
    let error = convert(&checkpoint, &dst, &plan, &options("mean"), &NoProgress).unwrap_err();
    assert!(matches!(error, Error::SourceChanged { .. }), "{error}");
    file.set_len(5_000).unwrap();
    let error = convert(&checkpoint, &dst, &plan, &options("mean"), &NoProgress).unwrap_err();
    assert!(error.to_string().contains("changed or truncated"), "{error}");
    assert!(files(out.path()).is_empty());
}

#[test]
fn two_conversions_into_one_folder_do_not_meet() {
    struct Second<'a>(&'a dyn Fn());
    // SAFETY: the test's only other thread never touches it
    unsafe impl Sync for Second<'_> {}
    impl Progress for Second<'_> {
        fn advance(&self, _: &str, _: u64, _: u64) -> std::result::Result<(), Interrupted> {
            (self.0)();
            Ok(())
        }
    }
    let (source, out) = (Synthetic::default().folder(), TempDir::new().unwrap());
    let dst = out.path().join("dst");
    let second = || {
        for options in [
            options("mean"),
            ConvertOptions { overwrite: true, ..options("mean") },
            ConvertOptions { resume: true, ..options("mean") },
        ] {
            let error = run(source.path(), &dst, "mqa:all", &options).unwrap_err();
            assert!(matches!(error, Error::Locked { .. }), "{error}");
        }
    };
    let checkpoint = Checkpoint::open(source.path()).unwrap();
    let plan = Plan::parse("mqa:all", checkpoint.config()).unwrap();
    convert(&checkpoint, &dst, &plan, &options("mean"), &Second(&second)).unwrap();
}

/// The first K/V heads and everything else.
fn first_heads(cache: LayerCache, weights: &LayerWeights) -> LayerWeights {
    let mut weights = weights.clone();
    let len = cache.num_key_value_heads() * 10 * 24;
    weights.k_proj.truncate(len);
    weights.v_proj.truncate(len);
    weights
}

/// Doubles `q_proj` and `o_proj`, keeps the first K/V heads.
struct Doubling(Vec<usize>);

impl LayerMethod for Doubling {
    fn merge_layer(
        &mut self,
        layer_idx: usize,
        cache: LayerCache,
        weights: &LayerWeights,
    ) -> std::result::Result<MergedLayer, LayerError> {
        self.0.push(layer_idx);
        let mut weights = first_heads(cache, weights);
        weights.q_proj.iter_mut().chain(&mut weights.o_proj).for_each(|value| *value *= 2.0);
        Ok(MergedLayer { weights, relative_error: 0.5, notes: serde_json::json!({ "predicted": layer_idx }) })
    }
}

#[test]
fn a_layer_method_gets_and_gives_whole_layers() {
    let (source, out) = (Synthetic { per_shard: 6, ..Synthetic::default() }.folder(), TempDir::new().unwrap());
    let dst = out.path().join("dst");
    let checkpoint = Checkpoint::open(source.path()).unwrap();
    let plan = Plan::parse("gqa2:1,3", checkpoint.config()).unwrap();
    let mut method = Doubling(Vec::new());
    let report = convert_layers(&checkpoint, &dst, &plan, &options("mean"), &mut method, &NoProgress).unwrap();
    assert_eq!(method.0, [1, 3]);
    assert_eq!(report.manifest.relative_error, [0.0, 0.5, 0.0, 0.5]);
    assert_eq!(report.manifest.layers["3"]["predicted"], 3);
    let after = Checkpoint::open(&dst).unwrap();
    for tensor in checkpoint.tensors() {
        let (before, now) = (values(&checkpoint, &tensor.name), values(&after, &tensor.name));
        let touched = tensor.name.contains("layers.1.self") || tensor.name.contains("layers.3.self");
        let kv = tensor.name.contains("k_proj") || tensor.name.contains("v_proj");
        match (touched, kv) {
            (true, true) => assert_eq!(now, before[..now.len()], "{}", tensor.name),
            (true, false) => {
                let doubled: Vec<f32> = before.iter().map(|value| value * 2.0).collect();
                assert_eq!(now, doubled, "{}", tensor.name);
            }
            _ => assert_eq!(now, before, "{}", tensor.name),
        }
    }
}

/// Stops at the second layer.
struct Stopping(usize);

impl LayerMethod for Stopping {
    fn merge_layer(
        &mut self,
        layer_idx: usize,
        cache: LayerCache,
        weights: &LayerWeights,
    ) -> std::result::Result<MergedLayer, LayerError> {
        self.0 += 1;
        if self.0 == 2 { Err(Interrupted.into()) } else { Keeping.merge_layer(layer_idx, cache, weights) }
    }
}

#[test]
fn an_interrupted_layer_method_leaves_nothing() {
    let (source, out) = (Synthetic::default().folder(), TempDir::new().unwrap());
    let checkpoint = Checkpoint::open(source.path()).unwrap();
    let plan = Plan::parse("gqa2:1,3", checkpoint.config()).unwrap();
    let dst = out.path().join("dst");
    let stopped = convert_layers(&checkpoint, &dst, &plan, &options("mean"), &mut Stopping(0), &NoProgress);
    assert!(matches!(stopped, Err(Error::Interrupted(_))));
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0);
}

#[test]
fn a_layer_method_resumes_where_it_was() {
    let (source, out) = (Synthetic { per_shard: 6, ..Synthetic::default() }.folder(), TempDir::new().unwrap());
    let (dst, whole) = (out.path().join("dst"), out.path().join("whole"));
    let checkpoint = Checkpoint::open(source.path()).unwrap();
    let plan = Plan::parse("gqa2:1,3", checkpoint.config()).unwrap();
    let resume = ConvertOptions { resume: true, ..options("mean") };
    let run = |dst: &Path, method: &mut dyn LayerMethod, progress: &dyn Progress| {
        convert_layers(&checkpoint, dst, &plan, &resume, method, progress)
    };
    let stopped = |dst: &Path| run(dst, &mut Doubling(Vec::new()), &StopAt(30_000, AtomicU64::new(0))).unwrap_err();
    let resumed = |dst: &Path| {
        let mut method = Doubling(Vec::new());
        run(dst, &mut method, &NoProgress).unwrap();
        method.0
    };
    assert_eq!(resumed(&whole), [1, 3]);
    stopped(&dst);
    assert_eq!(resumed(&dst), [0; 0]);
    assert_eq!(files(&dst), files(&whole));
    // what did not reach the disk is merged again
    let dst = out.path().join("other");
    assert!(matches!(run(&dst, &mut Stopping(0), &NoProgress), Err(Error::Interrupted(_))));
    let mut lost = 0;
    for entry in fs::read_dir(out.path().join("other.mqadapt-partial")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "partial") {
            fs::write(&path, vec![0; fs::metadata(&path).unwrap().len() as usize]).unwrap();
            lost += 1;
        }
    }
    assert!(lost > 0);
    assert_eq!(resumed(&dst), [1, 3]);
    assert_eq!(files(&dst), files(&whole));
}

/// Puts a file where the output is to be: everything is written, and then it does not get its name.
struct InTheWay<'a>(&'a Path);

impl Progress for InTheWay<'_> {
    fn advance(&self, _: &str, _: u64, _: u64) -> std::result::Result<(), Interrupted> {
        fs::write(self.0, "").map_err(|_| Interrupted)
    }
}

#[test]
fn a_layer_that_is_damaged_in_a_complete_shard_is_merged_again() {
    let (source, out) = (Synthetic { per_shard: 6, ..Synthetic::default() }.folder(), TempDir::new().unwrap());
    let (dst, whole) = (out.path().join("dst"), out.path().join("whole"));
    let checkpoint = Checkpoint::open(source.path()).unwrap();
    let plan = Plan::parse("gqa2:1,3", checkpoint.config()).unwrap();
    let resume = ConvertOptions { resume: true, ..options("mean") };
    let run = |dst: &Path, progress: &dyn Progress| {
        let mut method = Doubling(Vec::new());
        convert_layers(&checkpoint, dst, &plan, &resume, &mut method, progress).map(|report| (report.redone, method.0))
    };
    run(&whole, &NoProgress).unwrap();
    assert!(matches!(run(&dst, &InTheWay(&dst)), Err(Error::Appeared { .. })));
    fs::remove_file(&dst).unwrap();
    let name = "model.layers.1.self_attn.k_proj.weight";
    let done = Checkpoint::open(&whole).unwrap();
    let tensor = done.tensor(name).unwrap();
    let shard = out.path().join("dst.mqadapt-partial").join(done.shards()[tensor.shard].name());
    let mut bytes = fs::read(&shard).unwrap(); // complete: it has its name
    bytes[tensor.offset as usize + 1] ^= 1;
    fs::write(&shard, bytes).unwrap();
    let (redone, merged) = run(&dst, &NoProgress).unwrap();
    assert_eq!(merged, [1]);
    assert!(redone.iter().any(|note| note.contains("layer 1 is damaged")), "{redone:?}");
    assert!(redone.iter().any(|note| note.contains(shard.file_name().unwrap().to_str().unwrap())), "{redone:?}");
    assert_eq!(files(&dst), files(&whole));
}

/// Stops where the merge enters a layer.
struct StopBefore(u64);

impl Progress for StopBefore {
    fn advance(&self, phase: &str, done: u64, _total: u64) -> std::result::Result<(), Interrupted> {
        if phase == "calibrate" && done == self.0 { Err(Interrupted) } else { Ok(()) }
    }
}

#[test]
fn a_merge_from_text_resumes_where_it_was() {
    let (source, out) = (Synthetic::default().folder(), TempDir::new().unwrap());
    let checkpoint = Checkpoint::open(source.path()).unwrap();
    let plan = Plan::parse("gqa2:all", checkpoint.config()).unwrap();
    let resume = ConvertOptions { resume: true, ..options("closed-form") };
    let sequences = (0..3).map(|at| (0..60).map(|t| (t * 7 + at * 11) % 50).collect()).collect();
    let text = Calibration { sequences, target_contexts: vec![40] };
    for sequential in [false, true] {
        let run = |dst: &str, progress: &dyn Progress| {
            let told = CalibrationOptions { sequential, ..CalibrationOptions::default() };
            let closed_form = method("closed-form").unwrap();
            let merge = CalibratedMerge::new(&checkpoint, text.clone(), closed_form, told, None, DType::BF16).unwrap();
            let (mut layers, dst) =
                (CalibratedLayers::new(merge, progress), out.path().join(format!("{dst}{sequential}")));
            convert_layers(&checkpoint, &dst, &plan, &resume, &mut layers, progress).map(|_report| files(&dst))
        };
        assert!(matches!(run("dst", &StopBefore(2)), Err(Error::Interrupted(_))));
        let journal = out.path().join(format!("dst{sequential}.mqadapt-partial")).join("mqadapt.journal.jsonl");
        let layers = fs::read_to_string(journal).unwrap().matches("layer_xxh3_128").count();
        assert_eq!(layers, 2);
        assert_eq!(run("dst", &NoProgress).unwrap(), run("whole", &NoProgress).unwrap(), "sequential {sequential}");
    }
}

/// Keeps the first K/V heads and everything else.
struct Keeping;

impl LayerMethod for Keeping {
    fn merge_layer(
        &mut self,
        _: usize,
        cache: LayerCache,
        weights: &LayerWeights,
    ) -> std::result::Result<MergedLayer, LayerError> {
        Ok(MergedLayer { weights: first_heads(cache, weights), ..MergedLayer::default() })
    }
}

#[test]
fn biases_are_merged_too() {
    let config = CONFIG.replace("llama", "qwen2").replace("LlamaFor", "Qwen2For");
    let (source, out) = (Synthetic { config, ..Synthetic::default() }.folder(), TempDir::new().unwrap());
    let dst = out.path().join("dst");
    run(source.path(), &dst, "gqa4:2", &options("mean")).unwrap();
    let (before, after) = (Checkpoint::open(source.path()).unwrap(), Checkpoint::open(&dst).unwrap());
    let name = "model.layers.2.self_attn.v_proj.bias";
    let expected: Vec<f32> = mean(&values(&before, name), 8, 4).iter().map(|v| bf16::from_f32(*v).to_f32()).collect();
    assert_eq!(values(&after, name), expected);
    assert_eq!(after.tensor("model.layers.2.self_attn.q_proj.bias").unwrap().shape, [80]);
}
