//! Activations of the calibration text: some rows for every sequence, in memory or, where they are more than may be held,
//! in a file without a name, which is gone when the process is.

use std::borrow::Cow;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// How much memory the activations of a merge may take, and where they go if that is too little.
#[derive(Debug, Clone)]
pub struct Spill {
    /// Bytes of activations that may stay in memory; one sequence of them always does.
    pub max_memory: u64,
    /// A folder on a disk with room for the rest.
    pub folder: PathBuf,
}

/// Rows of `width` values for every token of some sequences.
pub struct Activations {
    lengths: Vec<usize>,
    width: usize,
    backing: Backing,
}

enum Backing {
    /// One vector a sequence.
    Memory(Vec<Vec<f32>>),
    /// Sequences one after the other, as they are in memory.
    File { file: File, folder: PathBuf },
}

impl Activations {
    /// Zeros; in a file of `folder` where there is one.
    ///
    /// # Errors
    /// [`Error::Io`] where the file cannot be written.
    pub fn new(lengths: Vec<usize>, width: usize, folder: Option<&Path>) -> Result<Self> {
        let backing = match folder {
            None => Backing::Memory(lengths.iter().map(|length| vec![0.0; length * width]).collect()),
            Some(folder) => {
                let file = tempfile::tempfile_in(folder).map_err(failed(folder))?;
                let bytes = lengths.iter().map(|length| (length * width * 4) as u64).sum();
                file.set_len(bytes).map_err(failed(folder))?;
                Backing::File { file, folder: folder.to_owned() }
            }
        };
        Ok(Self { lengths, width, backing })
    }

    /// Tokens of each sequence.
    #[must_use]
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// The rows of a sequence, `[tokens, width]`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read(&self, sequence: usize) -> Result<Cow<'_, [f32]>> {
        match &self.backing {
            Backing::Memory(rows) => Ok(Cow::Borrowed(rows.get(sequence).map_or(&[], Vec::as_slice))),
            Backing::File { file, folder } => {
                let mut values = vec![0.0; self.values(sequence)];
                let bytes = bytemuck::cast_slice_mut(&mut values);
                file.read_exact_at(bytes, self.offset(sequence)).map_err(failed(folder))?;
                Ok(Cow::Owned(values))
            }
        }
    }

    /// Takes the rows of a sequence, `[tokens, width]`.
    ///
    /// # Errors
    /// [`Error::Argument`] for another number of values, [`Error::Io`].
    pub fn write(&mut self, sequence: usize, values: Vec<f32>) -> Result<()> {
        if values.len() != self.values(sequence) {
            let detail = format!("of sequence {sequence} must be {}, found {}", self.values(sequence), values.len());
            return Err(Error::Argument { name: "activations", detail });
        }
        let at = self.offset(sequence);
        match &mut self.backing {
            Backing::Memory(rows) => rows.get_mut(sequence).map_or((), |row| *row = values),
            Backing::File { file, folder } => {
                file.write_all_at(bytemuck::cast_slice(&values), at).map_err(failed(folder))?;
            }
        }
        Ok(())
    }

    /// Zeros of another width, in the same kind of place.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn like(&self, width: usize) -> Result<Self> {
        let folder = match &self.backing {
            Backing::Memory(_) => None,
            Backing::File { folder, .. } => Some(folder.as_path()),
        };
        Self::new(self.lengths.clone(), width, folder)
    }

    /// The same once more.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn duplicate(&self) -> Result<Self> {
        let mut copy = self.like(self.width)?;
        for sequence in 0..self.lengths.len() {
            copy.write(sequence, self.read(sequence)?.into_owned())?;
        }
        Ok(copy)
    }

    fn values(&self, sequence: usize) -> usize {
        self.lengths.get(sequence).map_or(0, |length| length * self.width)
    }

    fn offset(&self, sequence: usize) -> u64 {
        self.lengths.iter().take(sequence).map(|length| (length * self.width * 4) as u64).sum()
    }
}

fn failed(folder: &Path) -> impl Fn(std::io::Error) -> Error + '_ {
    move |source| Error::Io { path: folder.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::Activations;

    #[test]
    fn a_file_holds_what_memory_holds() {
        let folder = tempfile::tempdir().unwrap();
        let stores = [None, Some(folder.path())];
        let [memory, file] = stores.map(|folder| {
            let mut rows = Activations::new(vec![2, 0, 3], 4, folder).unwrap();
            assert_eq!(rows.read(2).unwrap().as_ref(), [0.0; 12]);
            rows.write(2, (0..12u8).map(f32::from).collect()).unwrap();
            rows.write(0, vec![-1.5; 8]).unwrap();
            assert!(rows.write(0, vec![0.0; 7]).is_err());
            let copy = rows.duplicate().unwrap();
            rows.write(0, vec![3.0; 8]).unwrap();
            [rows, copy].map(|rows| (0..3).map(|s| rows.read(s).unwrap().into_owned()).collect::<Vec<_>>())
        });
        assert_eq!(memory, file);
        assert_eq!(memory[1], [vec![-1.5; 8], vec![], (0..12u8).map(f32::from).collect()]);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "the file has no name");
    }
}
