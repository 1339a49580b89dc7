//! A thread that reads pages of a frozen region that a store fills, before they are written.
//!
//! Role: the pager reads pages of plain memory itself, but here a page may be missing by the time it is read, because the program discards or moves it meanwhile: then the read waits for the
//! pager, which must not wait for itself (S2). Neighbours: `freezing` starts one for a region and hands it pages; it reads, and gives the bytes back to `freezing`. Invariants: holds no
//! mapping, so that a region's end never waits for it; ends when the region is frozen no more.

use super::{address_map::RegionId, engine::Engine};
use crate::sys::read_live_at;
use std::{
    io,
    sync::{Weak, mpsc},
};

/// See the module header.
#[derive(Debug)]
pub(super) struct Saver {
    jobs: mpsc::Sender<Job>,
}

/// A page that somebody waits to write, and where it is.
#[derive(Debug)]
struct Job {
    page: u64,
    address: usize,
}

impl Saver {
    pub(super) fn start(engine: Weak<Engine>, region: RegionId) -> io::Result<Saver> {
        let (jobs, to_do) = mpsc::channel::<Job>();
        std::thread::Builder::new().name("pageferry-save".into()).spawn(move || {
            while let Ok(Job { page, address }) = to_do.recv() {
                let Some(engine) = engine.upgrade() else { return };
                let mut bytes = vec![0; engine.page.len()];
                let read = read_live_at(address, &mut bytes).map(|()| bytes.into());
                engine.turn(|| engine.was_read(region, page, address, read));
            }
        })?;
        Ok(Saver { jobs })
    }

    /// Whether the thread is there to read it.
    pub(super) fn read(&self, page: u64, address: usize) -> bool {
        self.jobs.send(Job { page, address }).is_ok()
    }
}
