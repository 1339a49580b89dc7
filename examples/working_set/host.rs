//! The host of the image: serves it, and starts the program three times.
//!
//! Role: the order of events. Neighbours: `start` is what runs in the processes it starts, a [`Server`] serves them, `report` prints what came of it. Invariants: one start at a time, each a
//! process of its own; dropped, it kills the one that runs, and if it is killed itself, the end of their standard input tells them.

use crate::{
    Args,
    program::{PAGE_BYTES, compute, image, touched},
    report::Report,
    start::{How, Started},
    terminal::time,
};
use clap::ValueEnum;
use pageferry::{Capabilities, Grant, Identity, MemoryStore, PageSize, Server};
use std::{env, error::Error, net::Ipv4Addr, path::Path, process::Stdio, time::Duration};
use tokio::{io::AsyncReadExt, process::Command, time::timeout};

type Failure = Box<dyn Error + Send + Sync>;

/// For each round trip that a start may wait for, and for what it computes, on a busy machine and a link that loses some.
const PAGE_LIMIT: Duration = Duration::from_millis(20);
/// For the rest: connecting, all bytes of the image, its digest.
const START_LIMIT: Duration = Duration::from_secs(300);

/// Runs the whole of it. Cancellation: dropping the future kills the process that runs.
///
/// # Errors
/// What ended the run before it could be proved or disproved that every byte came.
pub async fn run(args: &Args) -> Result<Report, Failure> {
    Capabilities::probe().require_userfaultfd()?;
    let (size_bytes, touch_pages) = (args.size_bytes(), args.touched_bytes() / PAGE_BYTES);
    let image = image(size_bytes);
    let order = touched(size_bytes / PAGE_BYTES, touch_pages);
    let expected = order.iter().try_fold(0, |state, page| {
        let at = usize::try_from(page * PAGE_BYTES)?;
        Ok::<_, Failure>(compute(state, &image[at..at + usize::try_from(PAGE_BYTES)?]))
    })?;
    let digest = blake3::hash(&image).to_hex().to_string();

    let folder = tempfile::tempdir()?;
    let (key, set) = (folder.path().join("program.pem"), folder.path().join("start.pages"));
    let (host, program) = (Identity::generate()?, Identity::generate()?);
    program.save(&key)?;
    let store = MemoryStore::from_bytes(image, PageSize::KIB_4);
    let server =
        Server::builder(&host).grant(program.peer_id(), "image", store, Grant::Read).listen((Ipv4Addr::LOCALHOST, 0).into())?;
    let mut starts = Vec::new();
    for how in [How::Record, How::Plain, How::Replay] {
        let at = [("--address", server.local_addr().to_string()), ("--peer", host.peer_id().to_string())];
        let pages = [("--touch-pages", touch_pages.to_string())];
        let arguments = [&at[..], &pages].concat().into_iter().flat_map(|(name, value)| [name.to_owned(), value]);
        let limit = START_LIMIT + (PAGE_LIMIT + args.link.rtt() * 3) * u32::try_from(touch_pages)?;
        let started = start(how, arguments.chain(args.link.arguments()), (&key, &set), limit).await?;
        eprintln!("start {}: {} for {touch_pages} pages", name(how), time(started.took));
        starts.push((how, started));
    }
    Ok(Report { size_bytes, touch_pages, rtt: args.link.rtt(), starts, expected, digest })
}

async fn start(
    how: How,
    arguments: impl Iterator<Item = String>,
    (key, set): (&Path, &Path),
    limit: Duration,
) -> Result<Started, Failure> {
    let mut command = Command::new(env::current_exe()?);
    command.args(["start", "--how", &name(how)]).arg("--key").arg(key).arg("--set").arg(set).args(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
    // A group of its own: Ctrl-C goes to this process alone, which then ends both.
    let mut child = command.process_group(0).spawn()?;
    eprintln!("start {} is process {}", name(how), child.id().unwrap_or_default());
    let mut output = child.stdout.take().ok_or("the program has no standard output")?;
    let mut line = String::new();
    let ended = async {
        output.read_to_string(&mut line).await?;
        child.wait().await
    };
    let Ok(status) = timeout(limit, ended).await else {
        return Err(format!("start {} took longer than {limit:?} and was killed", name(how)).into());
    };
    let status = status?;
    match Started::from_json(&line) {
        Some(started) if status.success() => Ok(started),
        _ => Err(format!("start {} ended without a word of how it went: {status}", name(how)).into()),
    }
}

/// As the command line has it.
pub fn name(how: How) -> String {
    how.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}
