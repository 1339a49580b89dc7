//! The end that a program leaves, for bench `migration`.
//!
//! Role: a process with a region, a writer in it, and a source that offers both. Neighbours: `writer` is the program; the bench is the destination. Invariants: as `far_end`; the
//! content of the region follows from a seed.

use super::{
    PAGE_BYTES, Result,
    far_end::{FarEnd, answer, field},
    pages::Image,
    raw,
    timeline::{self, Told},
    writer::Writer,
};
use pageferry::{Gate, Grant, Identity, PeerId, Region, RegionStore, Server, Source, TransportOptions};
use serde_json::{Value, json};
use std::net::SocketAddr;

/// The role of the far end.
pub const ROLE: &str = "mover";
pub const REGION: &str = "program";

/// The near end's handle.
pub struct Mover {
    far_end: FarEnd,
    pub address: SocketAddr,
    pub id: PeerId,
}

/// What the program did where it came from.
pub struct Left {
    pub operations: u64,
    pub last_ns: u64,
    pub downtime_ms: f64,
    /// How it wrote and what the source told, in the form of `timeline`.
    pub writes: Value,
    pub copying: Value,
}

impl Mover {
    /// A program whose memory is that of `image` but for its first page and what it writes.
    pub fn start(bytes: u64, seed: u64, client: PeerId, mtu: u16) -> Result<Mover> {
        Mover::ask_for("start", bytes, seed, client, mtu)
    }

    /// The same program, which stays: its memory is served to be read, under the name of the region.
    pub fn stay(bytes: u64, seed: u64, client: PeerId, mtu: u16) -> Result<Mover> {
        Mover::ask_for("stay", bytes, seed, client, mtu)
    }

    fn ask_for(ask: &str, bytes: u64, seed: u64, client: PeerId, mtu: u16) -> Result<Mover> {
        let mut far_end = FarEnd::start(ROLE)?;
        let question = json!({ "ask": ask, "bytes": bytes, "seed": seed, "client": client.to_string(), "mtu": mtu });
        let started = far_end.ask(&question)?;
        let address = field(&started, "address", Value::as_str)?.parse()?;
        let id = field(&started, "id", Value::as_str)?.parse()?;
        Ok(Mover { far_end, address, id })
    }

    /// Operations so far.
    pub fn done(&mut self) -> Result<u64> {
        field(&self.far_end.ask(&json!({ "ask": "done" }))?, "operations", Value::as_u64)
    }

    pub fn cpu_of_both_s(&mut self) -> Result<f64> {
        Ok(raw::cpu_s() + self.far_end.cpu_s()?)
    }

    /// Waits until the program has departed.
    pub fn left(&mut self) -> Result<Left> {
        let mut left = self.far_end.ask(&json!({ "ask": "left" }))?;
        Ok(Left {
            operations: field(&left, "operations", Value::as_u64)?,
            last_ns: field(&left, "last_ns", Value::as_u64)?,
            downtime_ms: field(&left, "downtime_ms", Value::as_f64)?,
            writes: left["writes"].take(),
            copying: left["copying"].take(),
        })
    }
}

/// The image of such a program: 40 % of its pages are zero.
pub fn image(bytes: u64, seed: u64) -> Image {
    Image::incompressible_and_zero(bytes, seed)
}

struct Program {
    source: Source,
    writer: Option<Writer>,
    told: Told,
    runtime: tokio::runtime::Runtime,
    _region: Region,
}

/// One that stays.
struct Stays {
    _server: Server,
    _writer: Writer,
}

/// The far end.
pub fn far_end() -> Result<()> {
    let (mut program, mut stays): (Option<Program>, Option<Stays>) = (None, None);
    answer(|ask, question| match (ask, program.as_mut()) {
        ("start", _) => {
            let (started, running) = start(question)?;
            program = Some(running);
            Ok(started)
        }
        ("stay", _) => {
            let (started, running) = stay(question)?;
            stays = Some(running);
            Ok(started)
        }
        ("done", Some(program)) => Ok(json!({ "operations": program.writer.as_ref().map_or(0, Writer::done) })),
        ("left", Some(program)) => {
            let departed = program.runtime.block_on(program.source.departed())?;
            let wrote = program.writer.take().ok_or("it left before")?.stopped()?;
            let downtime_ms = departed.downtime.as_secs_f64() * 1e3;
            Ok(json!({
                "operations": wrote.operations,
                "last_ns": wrote.last_ns(),
                "downtime_ms": downtime_ms,
                "writes": timeline::writes(&wrote.done_ns, wrote.last_ns()),
                "copying": program.told.copying(),
            }))
        }
        (other, _) => Err(format!("a mover cannot '{other}'").into()),
    })
}

fn start(question: &Value) -> Result<(Value, Program)> {
    let Asked { client, transport, region } = Asked::read(question)?;
    let (identity, gate) = (Identity::generate()?, Gate::new());
    let writer = Writer::start(&region, Some(&gate));
    let source = Source::builder(&identity).grant(client, [&region]).gate(&gate).transport(transport);
    let source = source.listen("127.0.0.1:0".parse::<SocketAddr>()?)?;
    let told = Told::by(source.events());
    let started = json!({ "address": source.local_addr().to_string(), "id": identity.peer_id().to_string() });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok((started, Program { source, writer: Some(writer), told, runtime, _region: region }))
}

fn stay(question: &Value) -> Result<(Value, Stays)> {
    let Asked { client, transport, region } = Asked::read(question)?;
    let identity = Identity::generate()?;
    let writer = Writer::start(&region, None);
    let server = Server::builder(&identity).grant(client, REGION, RegionStore::new(&region), Grant::Read).transport(transport);
    let server = server.listen("127.0.0.1:0".parse::<SocketAddr>()?)?;
    let started = json!({ "address": server.local_addr().to_string(), "id": identity.peer_id().to_string() });
    Ok((started, Stays { _server: server, _writer: writer }))
}

/// What is the same of both.
struct Asked {
    client: PeerId,
    transport: TransportOptions,
    region: Region,
}

impl Asked {
    fn read(question: &Value) -> Result<Asked> {
        let (bytes, seed) = (field(question, "bytes", Value::as_u64)?, field(question, "seed", Value::as_u64)?);
        let client = field(question, "client", Value::as_str)?.parse()?;
        let mtu_max_bytes = u16::try_from(field(question, "mtu", Value::as_u64)?)?;
        let region = Region::builder().name(REGION).size(bytes).open()?;
        let image = image(bytes, seed);
        let mut page = vec![0; PAGE_BYTES as usize];
        // Page 0 is the count of operations.
        for at in 1..image.pages() {
            image.fill(at, &mut page);
            region.write_at(at * PAGE_BYTES, &page)?;
        }
        let transport = TransportOptions { mtu_max_bytes, ..TransportOptions::default() };
        Ok(Asked { client, transport, region })
    }
}
