//! One start of the program: it maps the image, runs, and says how it went.
//!
//! Role: the process that uses a mount. Neighbours: `host` starts it and reads its one line; `program` is what runs. Invariants: it knows of the image what comes over the link; every byte of
//! it is digested before it ends; it ends with its host.

use crate::{
    link::Link,
    program::{PAGE_BYTES, compute, touched},
};
use clap::ValueEnum;
use pageferry::{FaultAround, Identity, Mount, Peer, PeerId, Region, Trust, WorkingSet};
use serde_json::{Value, json};
use std::{
    error::Error,
    io::Read,
    net::SocketAddr,
    path::Path,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::task::spawn_blocking;

type Failure = Box<dyn Error + Send + Sync>;

/// What a start knows, and does about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum How {
    /// Nothing: a page comes when it is touched, and which were is recorded
    Record,
    /// Nothing: all pages come, by their number
    Plain,
    /// What an earlier start touched, which comes first
    Replay,
}

/// What came of a start.
#[derive(Clone, Debug)]
pub struct Started {
    /// From before the mount was opened until the program had touched and computed all.
    pub took: Duration,
    /// When each tenth of that was done.
    pub tenths: Vec<Duration>,
    /// Touches that waited.
    pub faults: u64,
    /// Of the image, when all was done.
    pub resident_pages: u64,
    /// Pages in the file of the record, and whether they are those touched, in that order.
    pub recorded_pages: u64,
    pub is_set_right: bool,
    /// What the program computed.
    pub result: u64,
    /// Of every byte of the image.
    pub digest: String,
}

impl Started {
    pub fn to_json(&self) -> Value {
        let us = |time: &Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        json!({
            "took_us": us(&self.took),
            "tenths_us": self.tenths.iter().map(us).collect::<Vec<_>>(),
            "faults": self.faults,
            "resident_pages": self.resident_pages,
            "recorded_pages": self.recorded_pages,
            "is_set_right": self.is_set_right,
            "result": self.result,
            "digest": self.digest,
        })
    }

    /// `None` if it is something else.
    pub fn from_json(line: &str) -> Option<Started> {
        let value: Value = serde_json::from_str(line).ok()?;
        let number = |name: &str| value.get(name)?.as_u64();
        let tenths = value.get("tenths_us")?.as_array()?.iter();
        Some(Started {
            took: Duration::from_micros(number("took_us")?),
            tenths: tenths.map(|us| us.as_u64().map(Duration::from_micros)).collect::<Option<_>>()?,
            faults: number("faults")?,
            resident_pages: number("resident_pages")?,
            recorded_pages: number("recorded_pages")?,
            is_set_right: value.get("is_set_right")?.as_bool()?,
            result: number("result")?,
            digest: value.get("digest")?.as_str()?.to_owned(),
        })
    }
}

/// Starts the program as the host's command line says.
pub async fn run(
    how: How,
    (address, host, key): (SocketAddr, PeerId, &Path),
    set: &Path,
    touch_pages: u64,
    link: &Link,
) -> ExitCode {
    // Its end is the host's: nobody writes to it.
    let host_ended = spawn_blocking(|| std::io::stdin().read(&mut [0]));
    let run = async {
        let identity = Identity::load(key)?;
        let peer = Peer::builder(address, Trust::ids([host]), &identity).transport(link.transport()).connect().await?;
        let store = Arc::new(peer.open("image").await?);
        start(how, store, set, touch_pages).await
    };
    let outcome = tokio::select! {
        outcome = run => outcome,
        _ = host_ended => Err("the host ended".into()),
    };
    match outcome {
        Ok(started) => {
            println!("{}", started.to_json());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("working_set, start {how:?}: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn start(how: How, store: Arc<dyn pageferry::PageStore>, file: &Path, touch_pages: u64) -> Result<Started, Failure> {
    let begun = Instant::now();
    let mount = Mount::builder(store).name("image").read_only();
    let mount = match how {
        How::Record => mount.record_touches(),
        How::Plain => mount,
        // A touch that outruns the pull asks for its own page; neighbours would take the link from pages of the record, which come next.
        How::Replay => mount.pull_order(WorkingSet::load(file)?.order()).fault_around(FaultAround::OFF),
    };
    let mount = mount.open()?;
    let region = mount.region().clone();
    let order = touched(region.extent().count(), touch_pages);
    let (region_of, order_of) = (region.clone(), order.clone());
    // It waits for pages: not on a worker of the runtime, which has the connection's errors to hear.
    let (tenths, result) = spawn_blocking(move || program(&region_of, &order_of, begun)).await??;
    let (faults, resident_pages) = (region.stats().faults, region.residency().resident);

    if how == How::Record {
        mount.working_set().save(file)?;
        region.pull().await?;
    } else {
        mount.pulled().await?;
    }
    let digest = spawn_blocking(move || digest(&region)).await??;
    let set = WorkingSet::load(file)?;
    let is_set_right = set.extents().iter().flat_map(|extent| extent.pages()).eq(order);
    mount.close().await?;
    let took = tenths.last().copied().unwrap_or_default();
    Ok(Started { took, tenths, faults, resident_pages, recorded_pages: set.pages(), is_set_right, result, digest })
}

/// Runs it, and says when each tenth of it was done and what it computed.
fn program(region: &Region, order: &[u64], begun: Instant) -> Result<(Vec<Duration>, u64), Failure> {
    let (mut tenths, mut page, mut state) = (Vec::new(), vec![0; usize::try_from(PAGE_BYTES)?], 0);
    for tenth in 1..=10 {
        for at in &order[order.len() * (tenth - 1) / 10..order.len() * tenth / 10] {
            region.read_at(at * PAGE_BYTES, &mut page)?;
            state = compute(state, &page);
        }
        tenths.push(begun.elapsed());
    }
    Ok((tenths, state))
}

fn digest(region: &Region) -> Result<String, Failure> {
    let (mut hasher, mut step) = (blake3::Hasher::new(), vec![0; 1 << 20]);
    for at in (0..region.size_bytes()).step_by(step.len()) {
        region.read_at(at, &mut step)?;
        hasher.update(&step);
    }
    Ok(hasher.finalize().to_hex().to_string())
}
