//! The end where the program starts: process A.
//!
//! Role: builds the index, runs the load until the handover, and afterwards says what the destination must have. Neighbours: `main`
//! binds it to a migration. Invariants: nothing of the program is outside the region and the bytes of
//! [`encode`](crate::load::encode).

use crate::{
    build::Builder,
    corpus,
    index::{Header, IndexError},
    report::Progress,
};
use pageferry::Region;
use std::{
    io,
    time::{Duration, Instant},
};
use thiserror::Error;

/// The name under which the region is migrated.
pub const REGION: &str = "index";

/// The index could not be built.
#[derive(Debug, Error)]
pub enum BuildError {
    #[error("no thread to read files: {0}")]
    Thread(#[from] io::Error),
    #[error(transparent)]
    Index(#[from] IndexError),
}

/// A built index.
pub struct Built {
    pub region: Region,
    pub header: Header,
    pub took: Duration,
}

/// Fills a new region of this size with an index of this machine's files.
///
/// # Errors
/// [`BuildError`]. Files that cannot be read are not errors; too few of them leave a part of the region unused, which
/// [`Header::used_bytes`] tells.
pub fn build(size_bytes: u64, progress: &Progress) -> Result<Built, BuildError> {
    let begun = Instant::now();
    let region = Region::builder().name(REGION).size(size_bytes).open().map_err(IndexError::from)?;
    let documents = corpus::read(corpus::roots())?;
    let mut builder = Builder::new(&region)?;
    // The hash table is there from the start; only the heap grows.
    let heap_bytes = |header: &Header| (header.heap_end - header.heap_start) * 8;
    let step = progress.begin("building the index", size_bytes - builder.header().used_bytes());
    for document in documents {
        let more = builder.add(&document.path, document.start, &document.text)?;
        step.reached(heap_bytes(builder.header()));
        if !more {
            break;
        }
    }
    let header = *builder.finish()?.header();
    step.done();
    Ok(Built { region, header, took: begun.elapsed() })
}
