//! Process A: builds the index, runs the load, offers the program, and proves what the destination reports.
//!
//! Role: the order of events. Neighbours: `process` is the other end's process, a [`Source`] hands the program over; `report` prints
//! what comes of it. Invariants: nothing of the program is outside the region and the bytes of [`encode`]; every wait has a limit, after
//! which the run ends with an error; the region stays as it was at the handover until the destination has reported.

use crate::{
    Args,
    build::Builder,
    corpus,
    index::{Header, Index, IndexError},
    ledger,
    load::{Load, View, encode, new_states},
    messages::{Message, Order, Outcome, Stage},
    process::{Process, ProcessError},
    progress::{Progress, Step, Total},
    proof,
    report::{Proof, Report},
    timeline::Clock,
};
use pageferry::{Capabilities, Gate, Identity, Pass, Region, Source};
use std::{
    error::Error,
    future::Future,
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};
use thiserror::Error;
use tokio::{task::spawn_blocking, time::timeout};

/// The name under which the region is migrated.
pub const REGION: &str = "index";
/// Every run asks for the same words in the same order.
const SEED: u64 = 0x7061_6765_6665_7272;
/// How often the progress of the load is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// Forty times what the largest index takes from a cold disk in a release build.
const BUILD_LIMIT: Duration = Duration::from_secs(600);
/// From the order to the destination's report, beside the load that was asked for: a gigabyte over a link of 100 Mbit/s takes 90 s.
const MOVE_LIMIT: Duration = Duration::from_secs(300);
/// For what takes milliseconds.
const STEP_LIMIT: Duration = Duration::from_secs(20);
/// For the source's own part of the proof.
const PROOF_LIMIT: Duration = Duration::from_secs(300);

type Failure = Box<dyn Error + Send + Sync>;

#[derive(Debug, Error)]
#[error("{what} took longer than {limit:?}")]
struct Late {
    what: &'static str,
    limit: Duration,
}

/// The destination is lost, and this is where the program is.
#[derive(Debug, Error)]
enum Lost {
    #[error("{cause}\nthe program had not changed hands: it ran on at the source until this end of the demo")]
    BeforeHandover { cause: Failure },
    #[error(
        "{cause}\nthe program had changed hands, so it is lost: the source still has its memory as it was at the handover, but never \
         runs it again by itself, or there might be two of it (promise S6 in docs/safety.md)"
    )]
    AfterHandover { cause: Failure },
}

/// Runs the whole of it. Cancellation: dropping the future kills process B.
///
/// # Errors
/// What ended the run before it could be proved or disproved that the program arrived.
pub async fn run(args: &Args) -> Result<Report, Failure> {
    Capabilities::probe().require_userfaultfd()?;
    let progress = Progress::new(args.quick);
    let (size_bytes, seeing) = (args.size_bytes(), progress.clone());
    let built = blocking("building the index", BUILD_LIMIT, move || build(size_bytes, &seeing)).await??;
    let mut process = Process::start(&args.link)?;
    let destination_id = process.peer_id().await?;
    progress.say(&format!("the source is process {}, the destination process {}", std::process::id(), process.pid()));

    // The program: its memory, its threads, and the place where they can be paused.
    let (gate, clock) = (Gate::new(), Clock::starting_now());
    let gate_of = |_| {
        let thread = gate.enter();
        move || thread.pass() == Pass::Run
    };
    let load = Load::start(&built.region, &new_states(usize::try_from(args.workers)?, SEED), clock, gate_of)?;
    let (identity, view) = (Identity::generate()?, load.view());
    let source = Source::builder(&identity)
        .grant(destination_id, [&built.region])
        .gate(&gate)
        .state({
            let view = view.clone();
            move || encode(&view.states())
        })
        .keep_memory() // for the proof: the destination's operations are made again on it
        .listen(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
    tokio::select! {
        () = run_load(args.load_time(), &view, &progress) => {}
        error = process.death() => return Err(lost(&source, error.into()).await.into()),
    }

    let order = Order {
        source: identity.peer_id(),
        address: source.local_addr(),
        epoch_unix_ns: clock.epoch_unix_ns(),
        load: args.load_time(),
        ask: args.ask.clone(),
    };
    let moving = async {
        process.order(&order).await?;
        hear_out(&mut process, built.region.len() as u64, &order, &progress).await
    };
    let outcome = match within("the migration", MOVE_LIMIT + order.load, moving).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(error)) => return Err(lost(&source, error.into()).await.into()),
        Err(late) => return Err(lost(&source, late.into()).await.into()),
    };
    let pid = process.pid();
    process.end().await?;
    let departed = within("releasing the program", STEP_LIMIT, source.departed()).await??;
    let observed = blocking("ending the load", STEP_LIMIT, move || load.join()).await??;

    let step = progress.begin("source proves", Total::Unknown);
    let (frozen, from, to) = (built.region.clone(), observed.states.clone(), outcome.observed.states.clone());
    let prove = move || {
        let totals_at_handover = ledger::verify(&Index::attach(&frozen)?, &from)?;
        let digest = proof::expected_digest(&frozen, &from, &to)?.to_hex().to_string();
        let totals = ledger::verify(&Index::attach(&frozen)?, &to)?;
        Ok::<_, ledger::LedgerError>(Proof { totals_at_handover, totals, digest })
    };
    let expected = blocking("the source's part of the proof", PROOF_LIMIT, prove).await??;
    step.done();
    Ok(Report {
        size_bytes,
        index: built.header,
        built_in: built.took,
        pids: (std::process::id(), pid),
        address: order.address,
        source: observed,
        downtime: Some(departed.downtime).filter(|downtime| !downtime.is_zero()),
        destination: outcome,
        expected,
    })
}

/// A built index.
struct Built {
    region: Region,
    header: Header,
    took: Duration,
}

/// Fills a new region of this size with an index of this machine's files. Files that cannot be read are no error; too few of them leave a
/// part of the region unused, which [`Header::used_bytes`] tells.
fn build(size_bytes: u64, progress: &Progress) -> Result<Built, Failure> {
    let begun = Instant::now();
    let region = Region::builder().name(REGION).size(size_bytes).open().map_err(IndexError::from)?;
    let documents = corpus::read(corpus::roots())?;
    let mut builder = Builder::new(&region)?;
    let step = progress.begin("source builds the index", Total::Bytes(size_bytes));
    for document in documents {
        let more = builder.add(&document.path, document.start, &document.text)?;
        step.reached(builder.header().used_bytes());
        if !more {
            break;
        }
    }
    let header = *builder.finish()?.header();
    step.done();
    Ok(Built { region, header, took: begun.elapsed() })
}

/// Shows the load for this long.
async fn run_load(time: Duration, view: &View, progress: &Progress) {
    let step = progress.begin("source answers queries", Total::Time(time));
    let end = tokio::time::sleep(time);
    tokio::pin!(end);
    let mut look = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            biased;
            () = &mut end => break,
            _ = look.tick() => step.passed(view.operations()),
        }
    }
    step.passed(view.operations());
    step.done();
}

/// Shows how far the destination is until it reports what came of it.
async fn hear_out(process: &mut Process, size_bytes: u64, order: &Order, progress: &Progress) -> Result<Outcome, ProcessError> {
    let begin = |stage| {
        let (name, total) = match stage {
            Stage::Taking => ("destination takes over", Total::Unknown),
            Stage::Arriving => ("pages follow it", Total::Bytes(size_bytes)),
            Stage::After => ("destination answers", Total::Time(order.load)),
            Stage::Proving => ("destination proves", Total::Unknown),
        };
        progress.begin(name, total)
    };
    let (mut stage, mut step): (_, Step) = (Stage::Taking, begin(Stage::Taking));
    loop {
        match process.next().await? {
            Message::Status(status) => {
                if status.stage != stage {
                    stage = status.stage;
                    std::mem::replace(&mut step, begin(stage)).done();
                }
                match stage {
                    Stage::Arriving => step.arrived(&status, size_bytes),
                    Stage::After => step.passed(status.operations),
                    Stage::Taking | Stage::Proving => {}
                }
            }
            Message::Outcome(outcome) => {
                step.done();
                return Ok(*outcome);
            }
            other => return Err(ProcessError::OutOfTurn(Box::new(other))),
        }
    }
}

/// Finds out where the program is, once and for all: an attempt under way is called off, or has already succeeded.
async fn lost(source: &Source, cause: Failure) -> Lost {
    source.cancel().await;
    if source.owns() { Lost::BeforeHandover { cause } } else { Lost::AfterHandover { cause } }
}

async fn within<T>(what: &'static str, limit: Duration, work: impl Future<Output = T>) -> Result<T, Late> {
    timeout(limit, work).await.map_err(|_| Late { what, limit })
}

/// As [`within`], for work that blocks: on a thread of its own, which is left behind when it is late.
async fn blocking<T: Send + 'static>(
    what: &'static str,
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Failure> {
    Ok(within(what, limit, spawn_blocking(work)).await??)
}
