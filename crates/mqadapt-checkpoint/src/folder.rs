//! A folder in Hugging Face layout: `config.json` and one or many safetensors shards.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mqadapt_core::ModelConfig;
use mqadapt_core::config::ExpectedTensor;
use mqadapt_core::family::{LM_HEAD, LayerTensor, Module};

use crate::contents::Contents;
use crate::error::HeaderProblem;
use crate::file::{self, MAX_CONFIG_BYTES, read_exact_at, read_small};
use crate::header::{Header, header_bytes};
use crate::index::{INDEX_FILE, Index, MAX_INDEX_BYTES, SINGLE_FILE};
use crate::naming::{adopt, by_name, split};
use crate::{Error, Result, Shard, ShardHead, ShardSource, StoredType, TensorInfo};

/// Opens a folder: configuration, index and headers, checked against each other.
pub(crate) fn open(folder: &Path) -> Result<Contents> {
    let config = read_config(folder)?;
    let index = if folder.join(SINGLE_FILE).exists() { None } else { Some(read_index(folder)?) };
    let names = index.as_ref().map_or_else(|| vec![SINGLE_FILE], |(_, index)| index.shards());
    let open = |name: &&str| {
        let path = folder.join(name);
        if !path.exists() {
            return Err(Error::MissingShard { folder: folder.to_owned(), shard: (*name).to_owned() });
        }
        open_shard(name, path)
    };
    let opened = names.iter().map(open).collect::<Result<Vec<_>>>()?;
    contents(folder, config, index.as_ref(), opened)
}

/// Opens a folder whose shards are remote.
pub(crate) fn open_remote(folder: &Path, heads: Vec<ShardHead>, source: &Arc<dyn ShardSource>) -> Result<Contents> {
    let config = read_config(folder)?;
    let single = heads.len() == 1 && heads.iter().all(|head| head.name == SINGLE_FILE);
    let index = if single { None } else { Some(read_index(folder)?) };
    let names = index.as_ref().map_or_else(|| vec![SINGLE_FILE], |(_, index)| index.shards());
    let mut heads: HashMap<String, ShardHead> = heads.into_iter().map(|head| (head.name.clone(), head)).collect();
    let take = |name: &&str| {
        let missing = || Error::MissingShard { folder: folder.to_owned(), shard: (*name).to_owned() };
        let head = heads.remove(*name).ok_or_else(missing)?;
        let header = parse_head(&head).map_err(|problem| Error::Header { path: folder.join(name), problem })?;
        Ok((Shard::remote(head, folder, header.metadata.clone(), Arc::clone(source)), header))
    };
    let opened = names.iter().map(take).collect::<Result<Vec<_>>>()?;
    contents(folder, config, index.as_ref(), opened)
}

/// Puts shards and headers together, and checks them against the index and the configuration.
fn contents(
    folder: &Path,
    mut config: ModelConfig,
    index: Option<&(PathBuf, Index)>,
    opened: Vec<(Shard, Header)>,
) -> Result<Contents> {
    let mut shards = Vec::with_capacity(opened.len());
    let mut tensors = Vec::new();
    for (number, (shard, header)) in opened.into_iter().enumerate() {
        tensors.extend(header.entries.into_iter().map(|entry| TensorInfo {
            name: entry.name,
            shape: entry.shape,
            dtype: StoredType::from_safetensors(entry.dtype),
            bytes: entry.bytes,
            shard: number,
            offset: header.data_start + entry.start,
            verbatim: true,
            view: None,
        }));
        shards.push(shard);
    }
    if let Some((path, index)) = index {
        check_index(path, index, &shards, &tensors)?;
    }
    adopt(&mut config, &mut tensors);
    refuse_unfused(folder, &config, &tensors)?;
    split(&config, &mut tensors);
    check_tensors(folder, &config, &shards, &tensors)?;
    Ok(Contents { config, shards, tensors })
}

pub(crate) fn read_config(folder: &Path) -> Result<ModelConfig> {
    let path = folder.join("config.json");
    if !path.exists() {
        let detail = "no such file; a checkpoint in Hugging Face layout has one".to_owned();
        return Err(Error::NotACheckpoint { path, detail });
    }
    let wrong = |source| Error::Config { path: path.clone(), source };
    let text = String::from_utf8(read_small(&path, MAX_CONFIG_BYTES)?)
        .map_err(|e| wrong(mqadapt_core::Error::Syntax { what: "config.json", detail: e.to_string() }))?;
    ModelConfig::from_json(&text).map_err(wrong)
}

fn read_index(folder: &Path) -> Result<(PathBuf, Index)> {
    let path = folder.join(INDEX_FILE);
    if !path.exists() {
        let detail = format!("neither {SINGLE_FILE} nor {INDEX_FILE} is in this folder");
        return Err(Error::NotACheckpoint { path: folder.to_owned(), detail });
    }
    let index = Index::parse(&read_small(&path, MAX_INDEX_BYTES)?)
        .map_err(|detail| Error::Index { path: path.clone(), detail })?;
    Ok((path, index))
}

/// The header of a shard of which only the first bytes are there.
fn parse_head(head: &ShardHead) -> std::result::Result<Header, HeaderProblem> {
    let short = || HeaderProblem::TooShort { len: head.head.len() as u64 };
    let (prefix, rest) = head.head.split_first_chunk::<8>().ok_or_else(short)?;
    let len = header_bytes(*prefix, head.bytes)?;
    let found = rest.len() as u64;
    let json = rest.get(..len).ok_or(HeaderProblem::Truncated { claimed: len as u64, found })?;
    Header::parse(json, head.bytes)
}

/// Opens a shard and reads its header.
fn open_shard(name: &str, path: PathBuf) -> Result<(Shard, Header)> {
    let (file, len) = file::open_regular(&path)?;
    let wrong = |problem| Error::Header { path: path.clone(), problem };
    if len < 8 {
        return Err(wrong(HeaderProblem::TooShort { len }));
    }
    let mut prefix = [0; 8];
    read_exact_at(&file, &path, 0, &mut prefix)?;
    // bounded by the file's length and by 100 MB
    let mut json = vec![0; header_bytes(prefix, len).map_err(wrong)?];
    read_exact_at(&file, &path, 8, &mut json)?;
    let header = Header::parse(&json, len).map_err(wrong)?;
    let shard = Shard::opened(name.to_owned(), path, len, file, header.metadata.clone());
    Ok((shard, header))
}

/// Every tensor of the index is in the shard it names, and every tensor of a shard is in the index.
fn check_index(path: &Path, index: &Index, shards: &[Shard], tensors: &[TensorInfo]) -> Result<()> {
    let said: HashMap<&str, &str> =
        index.weight_map.iter().map(|(name, shard)| (name.as_str(), shard.as_str())).collect();
    let mut found: BTreeMap<&str, &str> = BTreeMap::new();
    for tensor in tensors {
        let shard = shards.get(tensor.shard).map_or("", |shard| shard.name());
        let misplaced = |detail| Error::Misplaced { path: path.to_owned(), name: tensor.name.clone(), detail };
        match said.get(tensor.name.as_str()) {
            None => return Err(misplaced(format!("it is in '{shard}', but not in the index"))),
            Some(other) if *other != shard => {
                return Err(misplaced(format!("the index says '{other}', but it is in '{shard}'")));
            }
            Some(_) => {}
        }
        if let Some(other) = found.insert(&tensor.name, shard) {
            return Err(misplaced(format!("it is in '{other}' and in '{shard}'")));
        }
    }
    match index.weight_map.iter().find(|(name, _)| !found.contains_key(name.as_str())) {
        None => Ok(()),
        Some((name, shard)) => Err(Error::Misplaced {
            path: path.to_owned(),
            name: name.clone(),
            detail: format!("the index says '{shard}', but it is not there"),
        }),
    }
}

/// Every tensor that the model needs is there, with its shape, as floats.
pub(crate) fn check_tensors(
    source: &Path,
    config: &ModelConfig,
    shards: &[Shard],
    tensors: &[TensorInfo],
) -> Result<()> {
    let by_name = by_name(config, tensors);
    let mut all = config.tensors();
    if config.family.runnable && config.tie_word_embeddings && by_name.contains_key(LM_HEAD) {
        all.push(ExpectedTensor { name: LM_HEAD.to_owned(), shape: vec![config.vocab_size, config.hidden_size] });
    }
    for expected in all {
        let found = by_name.get(&expected.name).and_then(|&at| tensors.get(at));
        let Some(tensor) = found else {
            let expected = stored(config, expected);
            if let Some(whole) = tensors.iter().find(|tensor| tensor.name == expected.name) {
                let path = shards.get(whole.shard).map_or(source, |shard| shard.path()).to_owned();
                let found = whole.shape.clone();
                return Err(Error::Shape { path, name: expected.name, expected: expected.shape, found });
            }
            if let Some(shard) = unlisted_shard(source, shards) {
                let detail = format!("is missing; the folder has '{shard}', which the index does not name");
                return Err(Error::Misplaced { path: source.to_owned(), name: expected.name, detail });
            }
            let (path, name) = (source.to_owned(), expected.name);
            return Err(Error::MissingTensor { path, name, expected: expected.shape });
        };
        let path = || shards.get(tensor.shard).map_or_else(|| source.to_owned(), |shard| shard.path().to_owned());
        let unread = config.family.transposed && expected.shape.len() == 2 && tensor.view.is_none();
        if tensor.shape != expected.shape || (unread && LayerTensor::parse(&expected.name).is_some()) {
            let ExpectedTensor { name, shape: expected } = stored(config, expected);
            return Err(Error::Shape { path: path(), name, expected, found: tensor.shape.clone() });
        }
        let expected = ExpectedTensor { name: config.stored_name(&expected.name).into_owned(), ..expected };
        if let StoredType::Other(other) = tensor.dtype {
            return Err(Error::Dtype { path: path(), name: expected.name, found: format!("{other:?}") });
        }
    }
    Ok(())
}

/// A family whose files have tensors of several modules has no tensor for one of them: transformers would not find it.
fn refuse_unfused(folder: &Path, config: &ModelConfig, tensors: &[TensorInfo]) -> Result<()> {
    let alone = |tensor: &&TensorInfo| {
        LayerTensor::parse(&tensor.name).is_some_and(|role| config.family.fused_with(role.module).is_some())
    };
    let Some(tensor) = tensors.iter().find(alone) else { return Ok(()) };
    let found = ExpectedTensor { name: tensor.name.clone(), shape: tensor.shape.clone() };
    let ExpectedTensor { name, shape: expected } = stored(config, found);
    Err(Error::MissingTensor { path: folder.to_owned(), name, expected })
}

/// The tensor of the files that holds an expected one: its name, and the shape of all that it holds.
fn stored(config: &ModelConfig, expected: ExpectedTensor) -> ExpectedTensor {
    let name = config.stored_name(&expected.name).into_owned();
    let mut shape = expected.shape;
    let layer = LayerTensor::parse(&expected.name);
    let fused = layer.and_then(|t| Some((t.layer_idx, config.family.fused_with(t.module)?)));
    if let (Some((layer_idx, fused)), Some(rows)) = (fused, shape.first_mut()) {
        let of = |module: &Module| config.weight_shape(layer_idx, *module)?.first().copied();
        *rows = fused.modules.iter().filter_map(of).sum();
    }
    if config.family.transposed && layer.is_some() {
        shape.reverse();
    }
    ExpectedTensor { name, shape }
}

/// A shard that lies in the folder although the index does not name it.
fn unlisted_shard(folder: &Path, shards: &[Shard]) -> Option<String> {
    let names = fs::read_dir(folder).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut unlisted: Vec<_> = names
        .filter(|name| {
            name.ends_with(".safetensors") && name.contains("-of-") && !shards.iter().any(|s| s.name() == name)
        })
        .collect();
    unlisted.sort_unstable();
    unlisted.into_iter().next()
}
