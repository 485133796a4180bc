//! All of the output before the first byte is written: which tensor goes where, how it gets there, and every header.

use mqadapt_checkpoint::{Checkpoint, StoredType, TensorInfo};
use mqadapt_core::family::LayerTensor;
use mqadapt_core::{ModelConfig, Plan, TensorChange};
use serde_json::{Map, Value, json};

use crate::file_names::SINGLE_FILE;
use crate::{ConvertOptions, Error, Result};

/// What the layout follows from.
#[derive(Clone, Copy)]
pub(crate) struct Request<'a> {
    pub checkpoint: &'a Checkpoint,
    /// The configuration of the result.
    pub planned: &'a ModelConfig,
    pub plan: &'a Plan,
    pub options: &'a ConvertOptions,
    /// The method gives whole layers.
    pub whole_layers: bool,
}

/// The files of the output.
#[derive(Debug)]
pub(crate) struct Layout {
    pub shards: Vec<OutputShard>,
    /// The text of the index, where there is one.
    pub index: Option<String>,
}

/// A file of the output.
#[derive(Debug)]
pub(crate) struct OutputShard {
    pub name: String,
    /// Length and JSON, as they are written.
    pub header: Vec<u8>,
    /// Length of the file.
    pub bytes: u64,
    pub tensors: Vec<OutputTensor>,
    /// The next file is made from another source shard.
    pub ends_source: bool,
}

/// A tensor of the output.
#[derive(Debug, Clone)]
pub(crate) struct OutputTensor {
    /// Its name in the file; neighbours of one name are one tensor there, their rows one under the other.
    pub name: String,
    /// Index in the source's tensors.
    pub source: usize,
    pub shape: Vec<usize>,
    /// Shape of the tensor in the file, where it is not that of the neighbours of one name, one under the other: its values are
    /// those of the source in the source's order.
    pub stored_shape: Option<Vec<usize>>,
    pub dtype: StoredType,
    /// Where it begins in the file.
    pub offset: u64,
    pub bytes: u64,
    pub operation: Operation,
}

/// How a tensor gets into the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    /// Its bytes are copied.
    Copy,
    /// Its values are read in another type.
    Read,
    /// A share of the transpose of this and the neighbours of its name, one under the other.
    Transpose {
        /// Index of the first of them in the source's tensors, and their number.
        first: usize,
        count: usize,
        /// Values of the transpose before this share.
        before: usize,
    },
    /// Its heads are merged, row by row.
    Merge(LayerTensor),
    /// A method that needs the whole layer gives it.
    Layer(LayerTensor),
}

impl Layout {
    /// The layout of a checkpoint converted by a plan.
    pub fn new(request: Request<'_>) -> Result<Self> {
        let Request { checkpoint, options, .. } = request;
        let tensors = checkpoint.tensors().iter().enumerate();
        let mut outputs: Vec<_> =
            tensors.map(|(at, tensor)| request.output_tensor(at, tensor)).collect::<Result<_>>()?;
        if request.planned.family.transposed {
            transpose(&mut outputs, checkpoint);
        }
        let groups = match options.max_shard_size {
            Some(limit) => cut(&outputs, limit),
            None => by_source(outputs, checkpoint),
        };
        let count = groups.len();
        let name = |number: usize| match (count, options.max_shard_size) {
            (0 | 1, _) => SINGLE_FILE.to_owned(),
            (_, Some(_)) => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
            (_, None) => checkpoint.shards().get(number).map_or_else(String::new, |shard| shard.name().to_owned()),
        };
        let mut shards: Vec<_> = groups
            .into_iter()
            .enumerate()
            .map(|(number, tensors)| OutputShard::new(name(number), tensors, checkpoint))
            .collect();
        let source = |tensor: Option<&OutputTensor>| Some(checkpoint.tensors().get(tensor?.source)?.shard);
        for number in 1..shards.len() {
            let next = source(shards[number].tensors.first());
            shards[number - 1].ends_source = source(shards[number - 1].tensors.last()) != next;
        }
        let index = (count > 1).then(|| index_text(&shards));
        Ok(Self { shards, index })
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.bytes).sum()
    }
}

impl OutputShard {
    /// Places the tensors one after another and writes the header.
    fn new(name: String, mut tensors: Vec<OutputTensor>, checkpoint: &Checkpoint) -> Self {
        let metadata = match tensors.first().and_then(|t| checkpoint.tensors().get(t.source)) {
            Some(first) => checkpoint.shards().get(first.shard).and_then(|shard| shard.metadata()),
            None => None,
        };
        let mut header = Map::new();
        // transformers refuses a file that does not say which framework wrote it
        let metadata: Map<String, Value> = match metadata {
            Some(pairs) => pairs.iter().map(|(key, value)| (key.clone(), json!(value))).collect(),
            None => Map::from_iter([("format".to_owned(), json!("pt"))]),
        };
        header.insert("__metadata__".to_owned(), Value::Object(metadata));
        let mut end = 0;
        for together in tensors.chunk_by_mut(|a, b| a.name == b.name) {
            let start = end;
            for tensor in &mut *together {
                tensor.offset = end;
                end += tensor.bytes;
            }
            let Some(first) = together.first() else { continue };
            let dtype = first.dtype.safetensors().map_or(Value::Null, |dtype| json!(dtype));
            let entry = json!({ "dtype": dtype, "shape": joined_shape(together), "data_offsets": [start, end] });
            header.insert(first.name.clone(), entry);
        }
        let mut json = Value::Object(header).to_string().into_bytes();
        json.resize(json.len().next_multiple_of(8), b' ');
        let mut header = (json.len() as u64).to_le_bytes().to_vec();
        header.append(&mut json);
        for tensor in &mut tensors {
            tensor.offset += header.len() as u64;
        }
        Self { name, bytes: header.len() as u64 + end, header, tensors, ends_source: true }
    }
}

/// The shape of tensors that stand one under the other.
fn joined_shape(together: &[OutputTensor]) -> Vec<usize> {
    if let Some(stored) = together.first().and_then(|first| first.stored_shape.as_ref()) {
        return stored.clone();
    }
    let mut shape = together.first().map(|first| first.shape.clone()).unwrap_or_default();
    for other in together.iter().skip(1) {
        if let (Some(rows), Some(more)) = (shape.first_mut(), other.shape.first()) {
            *rows += more;
        }
    }
    shape
}

impl Request<'_> {
    /// Shape, type and way of one tensor.
    fn output_tensor(&self, at: usize, tensor: &TensorInfo) -> Result<OutputTensor> {
        let dtype = match (tensor.dtype, self.options.dtype) {
            (StoredType::Float(_) | StoredType::F64, Some(asked)) => StoredType::Float(asked),
            (StoredType::Ggml(_), asked) => StoredType::Float(asked.unwrap_or(self.checkpoint.dtype())),
            (stored, _) => stored,
        };
        // files of one family have their values in one order
        let same_family = std::ptr::eq(self.planned.family, self.checkpoint.config().family);
        let stored_shape = tensor.view.as_ref().filter(|_| same_family).map(|view| view.stored_shape.clone());
        let in_order = tensor.view.is_none() || stored_shape.is_some();
        let (operation, shape) = match self.changed(tensor) {
            Some((operation, layer)) => {
                let shape = self.planned.weight_shape(layer.layer_idx, layer.module);
                let shape = shape.map(|shape| if layer.bias { shape.into_iter().take(1).collect() } else { shape });
                (operation, shape.unwrap_or_else(|| tensor.shape.clone()))
            }
            None if tensor.dtype == dtype && tensor.verbatim && in_order => (Operation::Copy, tensor.shape.clone()),
            None => (Operation::Read, tensor.shape.clone()),
        };
        let name = self.options.target.tensor_name(self.planned, &tensor.name).into_owned();
        let bytes = match (operation, dtype.value_bytes()) {
            (Operation::Copy, _) => tensor.bytes, // of any type, sub-byte ones too
            (_, Some(width)) => (shape.iter().product::<usize>() * width) as u64,
            (_, None) => {
                let (path, name) = (self.checkpoint.path().to_owned(), tensor.name.clone());
                let found = tensor.dtype.to_string();
                return Err(Error::Checkpoint(mqadapt_checkpoint::Error::Dtype { path, name, found }));
            }
        };
        Ok(OutputTensor { source: at, name, shape, stored_shape, dtype, offset: 0, bytes, operation })
    }

    /// How a tensor changes, if the plan changes it.
    fn changed(&self, tensor: &TensorInfo) -> Option<(Operation, LayerTensor)> {
        let layer = LayerTensor::parse(&tensor.name)?;
        let operation = match self.plan.change(self.checkpoint.config(), layer) {
            TensorChange::Keep => return None,
            _ if self.whole_layers => Operation::Layer(layer),
            TensorChange::Heads { .. } => Operation::Merge(layer),
            TensorChange::Compensate => return None,
        };
        Some((operation, layer))
    }
}

/// Matrices of a family that stores them `[in_features, out_features]`, where the source (a GGUF file) does not.
fn transpose(outputs: &mut [OutputTensor], checkpoint: &Checkpoint) {
    let is_plain_matrix = |output: &OutputTensor| {
        let Some(tensor) = checkpoint.tensors().get(output.source) else { return false };
        let role = LayerTensor::parse(&tensor.name);
        tensor.view.is_none() && role.is_some_and(|role| !role.bias && !role.module.is_norm())
    };
    for together in outputs.chunk_by_mut(|a, b| a.name == b.name) {
        let (Some(first), count) = (together.first().map(|output| output.source), together.len()) else { continue };
        if !together.iter().all(is_plain_matrix) {
            continue;
        }
        let stored_shape: Vec<usize> = joined_shape(together).into_iter().rev().collect();
        let mut before = 0;
        for output in together {
            output.operation = Operation::Transpose { first, count, before };
            output.stored_shape = Some(stored_shape.clone());
            before += output.shape.iter().product::<usize>();
        }
    }
}

/// The source's own shards.
fn by_source(outputs: Vec<OutputTensor>, checkpoint: &Checkpoint) -> Vec<Vec<OutputTensor>> {
    let mut groups = vec![Vec::new(); checkpoint.shards().len()];
    for output in outputs {
        let shard = checkpoint.tensors().get(output.source).map_or(0, |tensor| tensor.shard);
        if let Some(group) = groups.get_mut(shard) {
            group.push(output);
        }
    }
    groups
}

/// Files of at most `limit` bytes of tensors, filled in source order; a tensor larger than that has a file of its own. Tensors of
/// one name stay together.
fn cut(outputs: &[OutputTensor], limit: u64) -> Vec<Vec<OutputTensor>> {
    let mut groups: Vec<Vec<OutputTensor>> = Vec::new();
    let mut room = 0;
    for together in outputs.chunk_by(|a, b| a.name == b.name) {
        let bytes = together.iter().map(|output| output.bytes).sum();
        match groups.last_mut() {
            Some(group) if bytes <= room => {
                room -= bytes;
                group.extend_from_slice(together);
            }
            _ => {
                room = limit.saturating_sub(bytes);
                groups.push(together.to_vec());
            }
        }
    }
    groups
}

/// `model.safetensors.index.json`, as `save_pretrained` writes it.
fn index_text(shards: &[OutputShard]) -> String {
    let mut places: Vec<(&str, &str)> = Vec::new();
    let mut total_size = 0;
    for shard in shards {
        for tensor in &shard.tensors {
            total_size += tensor.bytes;
            places.push((tensor.name.as_str(), shard.name.as_str()));
        }
    }
    places.sort_unstable();
    places.dedup();
    let weight_map: Map<_, _> = places.into_iter().map(|(name, shard)| (name.to_owned(), json!(shard))).collect();
    let index = json!({ "metadata": { "total_size": total_size }, "weight_map": weight_map });
    serde_json::to_string_pretty(&index).unwrap_or_default() + "\n"
}
