//! A game at sixty ticks a second moves to another process, or another host, while it is played.
//!
//! Role: the options, and the exit code. Neighbours: `source` is the end where the game begins, `destination` the one that takes it; one command runs both, or each its own terminal.
//! Invariants: exits with 0 only if the proof holds; leaves no process behind, however it ends; keeps no file but a key that it was told to.

mod destination;
#[path = "../common/link.rs"]
mod link;
mod map;
mod messages;
mod player;
mod process;
mod proof;
mod report;
mod screen;
mod source;
#[path = "../common/terminal.rs"]
mod terminal;
mod ticks;
mod world;

use clap::{Args, Parser, Subcommand, ValueEnum};
use link::Link;
use pageferry::{AtLimit, Identity, IdentityError, PeerId, Strategy};
use std::{
    error::Error,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};
use terminal::interrupted;
use tokio::runtime::Runtime;
use tracing_subscriber::EnvFilter;

type Failure = Box<dyn Error + Send + Sync>;

const ADDRESS: &str = "127.0.0.1:4433";

/// Herds graze on a meadow that is the memory of a region, at sixty ticks a second, and the game moves while it is played.
///
/// Without a command both ends run here, the destination as a process of its own, and one screen shows both. In the end the destination plays all ticks again on plain memory and compares.
///
/// Exit codes: 0, the proof holds; 1, it fails or the run did; 2, wrong options; 130 and 143, ended by Ctrl-C or SIGTERM.
#[derive(Clone, Debug, Parser)]
#[command(version)]
struct Command {
    #[command(subcommand)]
    role: Option<Role>,
    #[command(flatten)]
    options: Options,
}

#[derive(Clone, Debug, Subcommand)]
enum Role {
    /// The end where the game begins, in a terminal of its own
    Source {
        /// Where the game is offered
        #[arg(long, value_name = "ADDRESS", default_value = ADDRESS)]
        listen: SocketAddr,
        /// The id of the destination that may take it [default: asks for it]
        #[arg(long, value_name = "ID")]
        peer: Option<PeerId>,
        /// A file with this end's key, made if there is none [default: a key for this run]
        #[arg(long, value_name = "FILE")]
        key: Option<PathBuf>,
    },
    /// The end that takes it, in a terminal of its own
    Destination {
        /// Where the game is offered
        #[arg(long, value_name = "ADDRESS", default_value = ADDRESS)]
        connect: SocketAddr,
        /// The id of the source
        #[arg(long, value_name = "ID", required_unless_present = "piped")]
        peer: Option<PeerId>,
        /// A file with this end's key, made if there is none [default: a key for this run]
        #[arg(long, value_name = "FILE")]
        key: Option<PathBuf>,
        /// What the source starts: speaks JSON on its standard streams
        #[arg(long, hide = true)]
        piped: bool,
    },
}

#[derive(Clone, Debug, Args)]
struct Options {
    /// A meadow of 16 MiB and two seconds of play at each end, without pictures: for tests
    #[arg(long, global = true)]
    quick: bool,
    /// The meadow's memory in MiB: 4, 16, 64, 256 or 1024 [default: 64, with --quick 16]
    #[arg(long, value_name = "MIB", value_parser = square, global = true)]
    size: Option<u64>,
    /// Seconds of play at each end, beside the move [default: 5, with --quick 2]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=3600), global = true)]
    seconds: Option<u64>,
    /// How the memory moves
    #[arg(long, value_enum, default_value_t = Kind::Hybrid, global = true)]
    strategy: Kind,
    /// The most MiB a second that copying and pushing put on the wire, compressed, as over a link of 100 Mbit/s; 0 for no limit. What a tick waits for is not held back
    #[arg(long, value_name = "MIB", default_value_t = 12, global = true)]
    bandwidth: u64,
    #[command(flatten)]
    link: Link,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// The game moves first, its pages follow
    PostCopy,
    /// The pages go first, until the rest fits a short pause
    PreCopy,
    /// The pages go first, then the game, then what it wrote last
    Hybrid,
}

/// The pause that pre-copy aims at: three ticks. Its last bytes are not held back.
const DOWNTIME_LIMIT: Duration = Duration::from_millis(50);

impl Options {
    /// Tiles, and so pages, on a side of the meadow.
    fn side(&self) -> usize {
        let mib = self.size.unwrap_or(if self.quick { 16 } else { 64 });
        usize::try_from((mib << 8).isqrt()).unwrap_or(1)
    }

    fn play_time(&self) -> Duration {
        Duration::from_secs(self.seconds.unwrap_or(if self.quick { 2 } else { 5 }))
    }

    fn bandwidth_bytes_s(&self) -> Option<u64> {
        (self.bandwidth > 0).then(|| self.bandwidth.saturating_mul(1 << 20))
    }

    fn strategy(&self) -> Strategy {
        match self.strategy {
            Kind::PostCopy => Strategy::post_copy(),
            // A link too slow for it is no reason not to move.
            Kind::PreCopy => Strategy::pre_copy().downtime_limit(DOWNTIME_LIMIT).at_limit(AtLimit::Force),
            Kind::Hybrid => Strategy::hybrid(),
        }
    }

    fn strategy_name(&self) -> &'static str {
        match self.strategy {
            Kind::PostCopy => "post-copy",
            Kind::PreCopy => "pre-copy",
            Kind::Hybrid => "hybrid",
        }
    }

    /// What of this concerns a destination, as arguments.
    fn arguments(&self) -> Vec<String> {
        let seconds = self.play_time().as_secs().to_string();
        let mut arguments =
            ["destination", "--piped", "--strategy", self.strategy_name(), "--seconds", &seconds].map(str::to_owned).to_vec();
        arguments.extend(self.link.arguments());
        arguments
    }
}

fn main() -> ExitCode {
    let Command { role, options } = Command::parse();
    // RUST_LOG=pageferry=debug shows what the library does.
    tracing_subscriber::fmt().with_env_filter(EnvFilter::from_default_env()).with_writer(io::stderr).init();
    let runtime = match Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("game: no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let code = runtime.block_on(async {
        if matches!(role, Some(Role::Destination { piped: true, .. })) {
            // It has told its source already what there is to tell; Ctrl-C is the source's too.
            return destination::piped(&options).await;
        }
        tokio::select! {
            code = run(role, &options) => code,
            code = interrupted("game", "what it started") => code,
        }
    });
    // Threads that play or wait for a page end with the process.
    runtime.shutdown_background();
    code
}

async fn run(role: Option<Role>, options: &Options) -> ExitCode {
    let holds = match role {
        None => source::both(options).await,
        Some(Role::Source { listen, peer, key }) => match identity(key.as_deref()) {
            Ok(identity) => source::alone(options, listen, peer, &identity).await,
            Err(error) => Err(error.into()),
        },
        Some(Role::Destination { connect, peer, key, .. }) => match (identity(key.as_deref()), peer) {
            (Ok(identity), Some(peer)) => destination::alone(options, connect, peer, &identity).await,
            (Err(error), _) => Err(error.into()),
            (_, None) => Err("the source's id is missing: --peer ID".into()),
        },
    };
    match holds {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("game: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The key in this file; a new one, kept there if a file is named and was not there.
fn identity(file: Option<&Path>) -> Result<Identity, IdentityError> {
    match file {
        Some(file) if file.exists() => Identity::load(file),
        Some(file) => {
            let identity = Identity::generate()?;
            identity.save(file)?;
            Ok(identity)
        }
        None => Identity::generate(),
    }
}

/// A meadow is as high as it is wide, and grass hills repeat by halves: its MiB are a power of four.
fn square(text: &str) -> Result<u64, String> {
    let mib = text.parse().map_err(|_| "not a number of MiB".to_owned())?;
    if [4, 16, 64, 256, 1024].contains(&mib) { Ok(mib) } else { Err("a meadow is a square: 4, 16, 64, 256 or 1024 MiB".to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_options_make_sense_and_reach_the_destination() {
        Command::command().debug_assert();
        let parse = |line: &str| Command::try_parse_from(line.split(' '));
        let options = parse("game --quick --strategy pre-copy --seconds 7").unwrap().options;
        let arguments = std::iter::once("game".to_owned()).chain(options.arguments());
        let there = Command::try_parse_from(arguments).unwrap();
        assert!(matches!(there.role, Some(Role::Destination { piped: true, .. })));
        assert_eq!((there.options.strategy(), there.options.play_time()), (options.strategy(), options.play_time()));
        assert!(parse("game --size 65").is_err() && parse("game destination").is_err());
        assert_eq!([4, 64, 1024].map(|mib| parse(&format!("game --size {mib}")).unwrap().options.side()), [32, 128, 512]);
    }
}
