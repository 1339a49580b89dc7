//! Files and what every store in one needs: system calls off the runtime, and errors that say where.
//!
//! Role: runs what blocks on tokio's blocking threads and names failures. Neighbours: `file` and `cache` call it. Invariants: an errno
//! stays reachable as the source of the error; work whose caller is gone is told so.

use crate::{Extent, StoreError};
use std::{
    fs::File,
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};
use thiserror::Error;

/// Runs `work` on a blocking thread of the runtime that polls. Once the future is dropped, its flag tells `work` to stop.
pub(super) async fn run_blocking<T: Send + 'static>(
    operation: &'static str,
    extent: Extent,
    work: impl FnOnce(&AtomicBool) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    let runtime = tokio::runtime::Handle::try_current().map_err(|error| failed(operation, extent, io::Error::other(error)))?;
    let abandoned = SetOnDrop(Arc::default());
    let flag = abandoned.0.clone();
    match runtime.spawn_blocking(move || work(&flag)).await {
        Ok(result) => result,
        Err(error) if error.is_cancelled() => Err(StoreError::Closed),
        Err(error) => Err(failed(operation, extent, io::Error::other(error))),
    }
}

struct SetOnDrop(Arc<AtomicBool>);

impl Drop for SetOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// A new file's name is durable when its directory is (fsync(2)).
pub(super) fn sync_directory_of(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

pub(super) fn failed(operation: &'static str, extent: Extent, error: io::Error) -> StoreError {
    StoreError::Io { operation, extent, source: Arc::new(error) }
}

/// Opening fails before there are extents to speak of; the path says more. The errno stays reachable as the source's source.
pub(super) fn at_path(operation: &'static str, path: &Path, source: io::Error) -> StoreError {
    #[derive(Debug, Error)]
    #[error("{path}: {source}")]
    struct AtPath {
        path: String,
        source: io::Error,
    }
    let kind = source.kind();
    failed(operation, Extent::default(), io::Error::new(kind, AtPath { path: path.display().to_string(), source }))
}
