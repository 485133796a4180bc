//! Whether a converted checkpoint is what its manifest says, and, with the source at hand, what it should be.

use std::fs;
use std::path::Path;

use mqadapt_checkpoint::{Checkpoint, StoredType, TensorInfo, not_finite as not_finite_values};
use mqadapt_compress::{KvMerge, METHODS, MergeOptions, method};
use mqadapt_core::family::LayerTensor;
use mqadapt_core::{DType, Plan, Progress, TensorChange, cost};
use serde::Serialize;
use xxhash_rust::xxh3::Xxh3;

use crate::resume::journal::JOURNAL_FILE;
use crate::{Error, MANIFEST_FILE, Manifest, PARTIAL_SUFFIX, Result};

/// Bytes read at a time; a multiple of the size of any value.
const PIECE: usize = 1 << 20;
/// The phase that progress is reported under; its unit is bytes read.
const PHASE: &str = "verify";

/// What a verification found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Verification {
    /// What is wrong, a sentence each; none: the checkpoint is what it should be.
    pub problems: Vec<String>,
    /// Files checked.
    pub shards: usize,
    /// Tensors checked.
    pub tensors: usize,
    /// Bytes checked.
    pub bytes: u64,
    /// Tensors compared with the source.
    pub compared: usize,
    /// Tensors that were not, because the method that made them needs its calibration text.
    pub not_compared: usize,
}

/// Verifies a converted checkpoint: configuration, headers, sizes, index, manifest, checksums, and that every value is
/// finite. With `against`, that untouched tensors are the source's and touched ones what the manifest's method gives.
///
/// Progress is reported in bytes, phase `verify`.
///
/// # Errors
/// [`Error`] for what ends a verification: no checkpoint there, an unfinished one, a malformed header, index or manifest.
/// Whatever else is wrong is listed in [`Verification::problems`].
pub fn verify(folder: &Path, against: Option<&Checkpoint>, progress: &dyn Progress) -> Result<Verification> {
    refuse_unfinished(folder)?;
    let checkpoint = Checkpoint::open(folder)?;
    let manifest = Manifest::read(folder)?.ok_or_else(|| Error::Manifest {
        path: folder.join(MANIFEST_FILE),
        detail: "is not there: this is not a converted checkpoint".to_owned(),
    })?;
    let mut total: u64 = checkpoint.shards().iter().map(mqadapt_checkpoint::Shard::bytes).sum();
    if against.is_some() {
        total *= 2;
    }
    let out =
        Verification { shards: checkpoint.shards().len(), tensors: checkpoint.tensors().len(), ..Default::default() };
    let mut verifier = Verifier { checkpoint: &checkpoint, manifest: &manifest, progress, total, done: 0, out };
    verifier.manifest();
    verifier.content()?;
    if let Some(source) = against {
        verifier.against(source)?;
    }
    verifier.out.bytes = verifier.done;
    Ok(verifier.out)
}

/// A conversion that was killed leaves its traces.
fn refuse_unfinished(folder: &Path) -> Result<()> {
    let mut partial = folder.as_os_str().to_owned();
    partial.push(PARTIAL_SUFFIX);
    if !folder.exists() && Path::new(&partial).exists() {
        return Err(Error::Unfinished { path: partial.into() });
    }
    let inside =
        fs::read_dir(folder).into_iter().flatten().filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut traces = inside.filter(|name| name == JOURNAL_FILE || name.ends_with(".partial"));
    match traces.next() {
        Some(_) => Err(Error::Unfinished { path: folder.to_owned() }),
        None => Ok(()),
    }
}

struct Verifier<'a> {
    checkpoint: &'a Checkpoint,
    manifest: &'a Manifest,
    progress: &'a dyn Progress,
    total: u64,
    done: u64,
    out: Verification,
}

impl Verifier<'_> {
    fn problem(&mut self, problem: String) {
        self.out.problems.push(problem);
    }

    /// The manifest against configuration and files.
    fn manifest(&mut self) {
        let (said, found) = (&self.manifest.num_key_value_heads_after, &self.checkpoint.config().num_key_value_heads);
        if said != found {
            self.problem(format!("{MANIFEST_FILE} says num_key_value_heads {said:?}, config.json {found:?}"));
        }
        let said: Vec<_> = self.manifest.shards.iter().map(|shard| (shard.name.as_str(), shard.bytes)).collect();
        let found: Vec<_> = self.checkpoint.shards().iter().map(|shard| (shard.name(), shard.bytes())).collect();
        if said != found {
            self.problem(format!("{MANIFEST_FILE} lists the files {said:?}, the folder has {found:?}"));
        }
        self.unknown_names();
        self.figures();
    }

    /// What the manifest says that this version does not know, or that was written to the file afterwards.
    fn unknown_names(&mut self) {
        let Manifest { method: name, dtype, .. } = self.manifest;
        if method(name).is_none() {
            let known: Vec<_> = METHODS.iter().map(|method| method.name).collect();
            self.problem(format!(
                "{MANIFEST_FILE} says method {name:?}, expected one of {}; it is damaged, or another version wrote it: \
                 verify with mqadapt-rs {}",
                known.join(", "),
                self.manifest.mqadapt_version
            ));
        }
        // weights of 64 bits are stored, though nothing computes in them
        if DType::parse(dtype).is_none() && dtype != "float64" {
            self.problem(format!(
                "{MANIFEST_FILE} says dtype {dtype:?}, expected float64, float32, float16 or bfloat16"
            ));
        }
    }

    /// The manifest's figures against the configuration and against each other.
    fn figures(&mut self) {
        let manifest = self.manifest;
        let (before, after) = (&manifest.num_key_value_heads_before, &manifest.num_key_value_heads_after);
        let planned = &manifest.plan.num_key_value_heads;
        if planned != after {
            self.problem(format!(
                "{MANIFEST_FILE} says plan.num_key_value_heads {planned:?}, but num_key_value_heads_after {after:?}"
            ));
        }
        for (layer, ((before, after), error)) in before.iter().zip(after).zip(&manifest.relative_error).enumerate() {
            let expected = if before == after { "0" } else { "a number from 0 on" };
            if !(error.is_finite() && *error >= 0.0 && (before != after || *error == 0.0)) {
                self.problem(format!(
                    "{MANIFEST_FILE} says relative_error {error} of layer {layer}, expected {expected}"
                ));
            }
        }
        let Some(dtype) = DType::parse(&manifest.dtype) else { return };
        let config = self.checkpoint.config();
        let keep = Plan::keep(config);
        for (name, said, expected) in [
            (
                "kv_bytes_per_token_after",
                manifest.kv_bytes_per_token_after,
                cost::kv_bytes_per_token(config, &keep, dtype.bytes()),
            ),
            ("parameters_after", manifest.parameters_after, cost::parameters(config, &keep)),
        ] {
            if said != expected {
                self.problem(format!("{MANIFEST_FILE} says {name} {said}, by config.json it is {expected}"));
            }
        }
    }

    /// One pass over the files: checksums and non-finite values.
    fn content(&mut self) -> Result<()> {
        let checkpoint = self.checkpoint;
        let mut piece = vec![0; PIECE];
        for (number, shard) in checkpoint.shards().iter().enumerate() {
            let mut hash = Xxh3::new();
            let tensors: Vec<&TensorInfo> = checkpoint.tensors().iter().filter(|t| t.shard == number).collect();
            let header = tensors.first().map_or(shard.bytes(), |first| first.offset);
            self.pieces(shard, 0, header, &mut piece, |bytes| hash.update(bytes))?;
            for tensor in tensors {
                let mut not_finite = 0;
                self.pieces(shard, tensor.offset, tensor.bytes, &mut piece, |bytes| {
                    hash.update(bytes);
                    not_finite += not_finite_values(tensor.dtype, bytes);
                })?;
                if not_finite > 0 {
                    let name = name_of_share(checkpoint, tensor);
                    self.problem(format!("tensor '{name}' has {not_finite} values that are not finite"));
                }
            }
            let found = format!("{:032x}", hash.digest128());
            let said =
                self.manifest.shards.iter().find(|record| record.name == shard.name()).map(|record| &record.xxh3_128);
            if said.is_some_and(|said| *said != found) {
                self.problem(format!(
                    "'{}' does not have the content that was written: its checksum is {found}",
                    shard.name()
                ));
            }
        }
        Ok(())
    }

    fn pieces(
        &mut self,
        shard: &mqadapt_checkpoint::Shard,
        offset: u64,
        len: u64,
        piece: &mut [u8],
        mut each: impl FnMut(&[u8]),
    ) -> Result<()> {
        let mut at = 0;
        while at < len {
            let most = usize::try_from(len - at).unwrap_or(usize::MAX).min(piece.len());
            let Some(bytes) = piece.get_mut(..most) else { break };
            shard.read_exact_at(offset + at, bytes)?;
            each(bytes);
            at += most as u64;
            self.advance(most as u64)?;
        }
        Ok(())
    }

    /// Every tensor against what the source and the manifest's plan and method give.
    fn against(&mut self, source: &Checkpoint) -> Result<()> {
        let fingerprint = source.fingerprint()?;
        if fingerprint != self.manifest.source.fingerprint {
            let said = &self.manifest.source;
            self.problem(format!(
                "{} is not what was converted: its fingerprint is {fingerprint}, that of '{}' was {}",
                source.path().display(),
                said.name,
                said.fingerprint
            ));
        }
        let (said, found) = (&self.manifest.num_key_value_heads_before, &source.config().num_key_value_heads);
        if said != found {
            self.problem(format!("{MANIFEST_FILE} says num_key_value_heads_before {said:?}, the source has {found:?}"));
        }
        let plan = match Plan::from_heads(&self.manifest.plan.num_key_value_heads, source.config()) {
            Ok(plan) => plan,
            Err(error) => {
                self.problem(format!("the plan in {MANIFEST_FILE} does not fit {}: {error}", source.path().display()));
                return Ok(());
            }
        };
        let checkpoint = self.checkpoint;
        if checkpoint.config().stored != source.config().stored {
            self.problem(format!("one of it and {} is a base model, the other is not", source.path().display()));
        }
        for tensor in source.tensors().iter().filter(|tensor| checkpoint.tensor(&tensor.name).is_none()) {
            self.problem(format!("tensor '{}' of the source is missing", tensor.name));
        }
        for tensor in checkpoint.tensors() {
            match source.tensor(&tensor.name) {
                None => self.problem(format!("tensor '{}' is not in the source", tensor.name)),
                Some(original) => self.tensor(source, original, tensor, &plan)?,
            }
        }
        Ok(())
    }

    /// One tensor against its original.
    fn tensor(&mut self, source: &Checkpoint, original: &TensorInfo, tensor: &TensorInfo, plan: &Plan) -> Result<()> {
        let layer = LayerTensor::parse(&tensor.name);
        let change = layer.map_or(TensorChange::Keep, |layer| plan.change(source.config(), layer));
        let options = self.merge_options();
        let rows = method(&self.manifest.method).and_then(mqadapt_compress::Method::rows);
        let merge = layer.zip(rows).and_then(|(layer, rows)| KvMerge::of(layer, source.config(), plan, rows, &options));
        let different = match (change, rows, merge) {
            (TensorChange::Heads { .. } | TensorChange::Compensate, None, _) => {
                self.out.not_compared += 1;
                return self.advance(tensor.bytes);
            }
            (_, _, Some(merge)) => self.merged(source, original, tensor, &merge)?,
            _ => self.same(source, original, tensor)?,
        };
        self.out.compared += 1;
        if let Some(difference) = different {
            self.problem(format!("tensor '{}' {difference}", tensor.name));
        }
        Ok(())
    }

    /// Whether a tensor is its original, in its own dtype.
    fn same(&mut self, source: &Checkpoint, original: &TensorInfo, tensor: &TensorInfo) -> Result<Option<String>> {
        if original.shape != tensor.shape {
            return Ok(Some(format!("has shape {:?}, the source's {:?}", tensor.shape, original.shape)));
        }
        let allowed = [Some(original.dtype), DType::parse(&self.manifest.dtype).map(StoredType::Float)];
        if !allowed.contains(&Some(tensor.dtype)) {
            return Ok(Some(format!("is stored as {}, the source's as {}", tensor.dtype, original.dtype)));
        }
        let (mut own, mut expected) = (vec![0; PIECE], vec![0; PIECE]);
        let mut at = 0;
        while at < tensor.bytes {
            let most = usize::try_from(tensor.bytes - at).unwrap_or(usize::MAX).min(PIECE);
            let (Some(own), Some(expected)) = (own.get_mut(..most), expected.get_mut(..most)) else { break };
            let first_value = at as usize / tensor.dtype.value_bytes().unwrap_or(1);
            self.checkpoint.read_stored(tensor, first_value, own)?;
            match tensor.dtype.float() {
                Some(dtype) => {
                    source.read_as(original, dtype, first_value, expected)?;
                }
                None => source.read_stored(original, first_value, expected)?,
            }
            if own != expected {
                return Ok(Some("is not the source's, although the plan does not touch it".to_owned()));
            }
            at += most as u64;
            self.advance(most as u64)?;
        }
        Ok(None)
    }

    /// Whether a tensor is the merge of its original.
    fn merged(
        &mut self,
        source: &Checkpoint,
        original: &TensorInfo,
        tensor: &TensorInfo,
        merge: &KvMerge<'_>,
    ) -> Result<Option<String>> {
        let stored = tensor.dtype;
        let Some(width) = stored.value_bytes() else { return Ok(Some(format!("is stored as {stored}"))) };
        let checkpoint = self.checkpoint;
        let mut different = 0;
        let read = |first: usize, out: &mut [f32]| Ok(source.read_finite(original, first, out)?);
        let write = |first: usize, merged: &mut [f32]| {
            let (mut expected, mut own) = (vec![0; merged.len() * width], vec![0; merged.len() * width]);
            mqadapt_checkpoint::store(merged, stored, &mut expected);
            checkpoint.read_stored(tensor, first, &mut own)?;
            let pairs = own.chunks_exact(width).zip(expected.chunks_exact(width));
            different += pairs.filter(|(own, expected)| own != expected).count();
            self.advance(own.len() as u64)
        };
        match merge.run::<Error>(read, write) {
            Ok(_) => {}
            Err(Error::Checkpoint(error @ mqadapt_checkpoint::Error::NotFinite { .. })) => {
                return Ok(Some(format!("cannot be what the source gives: {error}")));
            }
            Err(error) => return Err(error),
        }
        let method = &self.manifest.method;
        Ok((different > 0).then(|| format!("has {different} values that are not what '{method}' gives")))
    }

    fn merge_options(&self) -> MergeOptions {
        let options = &self.manifest.options;
        let default = MergeOptions::default();
        MergeOptions {
            seed: options.get("seed").and_then(serde_json::Value::as_u64).unwrap_or(default.seed),
            initializer_range: options
                .get("initializer_range")
                .and_then(serde_json::Value::as_f64)
                .unwrap_or(default.initializer_range),
        }
    }

    fn advance(&mut self, bytes: u64) -> Result<()> {
        self.done += bytes;
        Ok(self.progress.advance(PHASE, self.done, self.total.max(self.done))?)
    }
}

/// What to call the values of a tensor's share of a stored one: that one, where they need not be the tensor's own.
pub(crate) fn name_of_share(checkpoint: &Checkpoint, tensor: &TensorInfo) -> String {
    match tensor.view {
        Some(_) => checkpoint.config().stored_name(&tensor.name).into_owned(),
        None => tensor.name.clone(),
    }
}
