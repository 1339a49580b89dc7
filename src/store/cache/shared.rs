//! What the handles of a cache share: the files, what is known of each page, and the steps that change it.
//!
//! Role: every step here blocks and is made whole or not at all. Neighbours: `cache` runs the steps on blocking threads; `disk` keeps the
//! journal, a [`FileStore`] the bytes. Invariants: locks are taken in the order stripe, journal, pages; bytes are durable before the
//! journal says that they count, and the journal says that a clean copy counts no longer before it is written over; a page is
//! `Pushing` before it is read to be pushed, and a write takes that back (S5).

use super::{disk::JournalFile, journal::Mark, spans::Spans};
use crate::{Content, Extent, FileStore, Run, StoreError, store::Layout};
use bytes::{Bytes, BytesMut};
use nix::fcntl::Flock;
use std::{
    fs::File,
    sync::{Mutex, MutexGuard, PoisonError, RwLock},
};

/// As in `FileStore`.
const STRIPES: usize = 64;

/// What the file holds of a page that counts; what has none is had from the remote store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// As the remote store has it; the journal does not say so yet.
    Fetched,
    /// As the remote store has it.
    Clean,
    /// Written; the journal does not say so yet.
    Written,
    /// Written, and not to be lost.
    Dirty,
    /// The same, and read for the push under way since its last write.
    Pushing,
}

impl State {
    pub(super) fn is_dirty(self) -> bool {
        matches!(self, State::Written | State::Dirty | State::Pushing)
    }
}

/// One piece of a read.
pub(super) enum Found {
    Here(Run),
    Missing(Extent),
}

pub(super) struct Shared {
    pub(super) layout: Layout,
    data: FileStore,
    stripes: [RwLock<()>; STRIPES],
    journal: Mutex<JournalFile>,
    pages: Mutex<Spans<State>>,
    _lock: Flock<File>,
}

impl Shared {
    pub(super) fn new(layout: Layout, data: FileStore, journal: JournalFile, marks: &Spans<Mark>, lock: Flock<File>) -> Shared {
        let mut pages = Spans::default();
        for (extent, mark) in marks.iter() {
            pages.set(extent, Some(if mark == Mark::Clean { State::Clean } else { State::Dirty }));
        }
        let stripes = [const { RwLock::new(()) }; STRIPES];
        Shared { layout, data, stripes, journal: Mutex::new(journal), pages: Mutex::new(pages), _lock: lock }
    }

    pub(super) fn pages(&self) -> MutexGuard<'_, Spans<State>> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn journal(&self) -> MutexGuard<'_, JournalFile> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stripe(&self, chunk: u64) -> &RwLock<()> {
        &self.stripes[chunk as usize % STRIPES]
    }

    /// What is here of an extent, and what is not.
    pub(super) fn look(&self, extent: Extent) -> Result<Vec<Found>, StoreError> {
        let mut found = Vec::new();
        for (chunk, piece) in self.layout.pieces(extent) {
            let _shared = self.stripe(chunk).read().unwrap_or_else(PoisonError::into_inner);
            let known = self.pages().within(piece);
            // Neighbours that differ only in how clean they are are read at once.
            for (part, here) in merged(known.into_iter().map(|(part, state)| (part, state.is_some()))) {
                if here {
                    found.extend(self.data.read_now(part)?.into_iter().map(Found::Here));
                } else {
                    found.push(Found::Missing(part));
                }
            }
        }
        Ok(found)
    }

    /// Writes an extent. `retire` is told of each piece before its bytes change, while no reader can look at it.
    pub(super) fn write(
        &self,
        extent: Extent,
        bytes: &[u8],
        abandoned: impl Fn() -> bool,
        retire: impl Fn(Extent),
    ) -> Result<(), StoreError> {
        for (chunk, piece) in self.layout.pieces(extent) {
            let _alone = self.stripe(chunk).write().unwrap_or_else(PoisonError::into_inner);
            if abandoned() {
                return Err(StoreError::Closed);
            }
            retire(piece);
            self.prepare(piece)?;
            self.data.write_now(piece, &bytes[self.layout.range_in(extent, piece)])?;
            // Only now: what the journal says is written has to be in the file.
            self.pages().change(piece, |state| match state {
                Some(State::Dirty) => state,
                _ => Some(State::Written),
            });
        }
        Ok(())
    }

    /// Before bytes of `piece` change: nothing says any more that they are what the remote store has.
    fn prepare(&self, piece: Extent) -> Result<(), StoreError> {
        let begin = |state| match state {
            Some(State::Fetched) => None,
            Some(State::Pushing) => Some(State::Dirty),
            state => state,
        };
        let is_clean = |pages: &Spans<State>| pages.within(piece).iter().any(|(_, state)| *state == Some(State::Clean));
        {
            let mut pages = self.pages();
            pages.change(piece, begin);
            if !is_clean(&pages) {
                return Ok(());
            }
        }
        // A page becomes clean under the journal's lock only, so from here on the journal and `pages` agree on these.
        let mut journal = self.journal();
        let forgotten = self.pages().change(piece, |state| state.filter(|state| *state != State::Clean));
        let entries = forgotten.iter().map(|(extent, _)| (*extent, None));
        journal.try_append(entries).inspect_err(|_| {
            let mut pages = self.pages();
            forgotten.iter().for_each(|(extent, was)| pages.set(*extent, *was));
        })
    }

    /// Keeps what the remote store answered of the pages that are still missing. `is_stale` says whether a write began since it was asked.
    pub(super) fn keep(&self, runs: &[Run], is_stale: impl Fn() -> bool) -> Result<(), StoreError> {
        for run in runs {
            for (chunk, piece) in self.layout.pieces(run.extent) {
                let _alone = self.stripe(chunk).write().unwrap_or_else(PoisonError::into_inner);
                if is_stale() {
                    return Ok(());
                }
                let missing: Vec<Extent> =
                    self.pages().within(piece).into_iter().filter(|(_, state)| state.is_none()).map(|(part, _)| part).collect();
                for part in missing {
                    match &run.content {
                        Content::Bytes(bytes) => self.data.write_now(part, &bytes[self.layout.range_in(run.extent, part)])?,
                        // A hole already, unless something that does not count was left here.
                        Content::Zero if matches!(&self.data.read_now(part)?[..], [Run { content: Content::Zero, .. }]) => {}
                        Content::Zero => self.data.write_now(part, &vec![0; part.bytes(self.layout.page_size) as usize])?,
                    }
                    self.pages().set(part, Some(State::Fetched));
                }
            }
        }
        Ok(())
    }

    /// Makes everything that was written durable here, and what was fetched too.
    pub(super) fn settle(&self) -> Result<(), StoreError> {
        let mut journal = self.journal();
        // Before the flush, under the journal's lock: a write from here on to one that becomes clean waits for the lock, and says so.
        let settled = self.pages().change(self.layout.extent(), |state| match state {
            Some(State::Fetched) => Some(State::Clean),
            Some(State::Written) => Some(State::Dirty),
            state => state,
        });
        self.data.flush_now()?;
        journal.append(
            settled
                .into_iter()
                .map(|(extent, was)| (extent, Some(if was == Some(State::Fetched) { Mark::Clean } else { Mark::Dirty }))),
        )
    }

    /// What is to be pushed, in pieces of one chunk each.
    pub(super) fn dirty(&self) -> Vec<Extent> {
        let due: Vec<Extent> = self.pages().iter().filter(|(_, state)| *state == State::Dirty).map(|(extent, _)| extent).collect();
        due.into_iter().flat_map(|extent| self.layout.pieces(extent).map(|(_, piece)| piece).collect::<Vec<_>>()).collect()
    }

    /// Marks what is dirty of a piece as being pushed, and then reads it.
    pub(super) fn take(&self, piece: Extent) -> Result<Vec<(Extent, Bytes)>, StoreError> {
        let mut taken = Vec::new();
        for (chunk, piece) in self.layout.pieces(piece) {
            // Keeps writers out from the mark to the end of the reading: a write is wholly in what is read, or takes the mark back.
            let _shared = self.stripe(chunk).read().unwrap_or_else(PoisonError::into_inner);
            let mark = |state| if state == Some(State::Dirty) { Some(State::Pushing) } else { state };
            let marked = self.pages().change(piece, mark);
            for (extent, _) in marked {
                taken.push((extent, self.bytes(extent)?));
            }
        }
        Ok(taken)
    }

    fn bytes(&self, extent: Extent) -> Result<Bytes, StoreError> {
        let mut whole = BytesMut::zeroed(extent.bytes(self.layout.page_size) as usize);
        for run in self.data.read_now(extent)? {
            if let Content::Bytes(bytes) = run.content {
                whole[self.layout.range_in(extent, run.extent)].copy_from_slice(&bytes);
            }
        }
        Ok(whole.freeze())
    }

    /// The remote store has what the push took: what was not written since is clean.
    pub(super) fn pushed(&self) -> Result<(), StoreError> {
        let mut journal = self.journal();
        let clean = self
            .pages()
            .change(self.layout.extent(), |state| if state == Some(State::Pushing) { Some(State::Clean) } else { state });
        // What was pushed may be younger than what was flushed here last, and counts as the remote store's from now on.
        self.data.flush_now()?;
        journal.append(clean.into_iter().map(|(extent, _)| (extent, Some(Mark::Clean))))
    }

    /// The remote store may not have what the push took.
    pub(super) fn not_pushed(&self) {
        let dirty = |state| if state == Some(State::Pushing) { Some(State::Dirty) } else { state };
        self.pages().change(self.layout.extent(), dirty);
    }
}

/// Neighbours of one kind put together.
fn merged(parts: impl Iterator<Item = (Extent, bool)>) -> Vec<(Extent, bool)> {
    let mut merged: Vec<(Extent, bool)> = Vec::new();
    for (part, here) in parts {
        match merged.last_mut() {
            Some((last, same)) if *same == here && last.end() == part.first() => *last = Extent::between(last.first(), part.end()),
            _ => merged.push((part, here)),
        }
    }
    merged
}
