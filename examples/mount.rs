//! Files of one host as memory of another: they fill in the background while they are read, and what is written goes back.
//!
//! Role: a mount as a tool would have it. Neighbours: [`Mount`] and [`FileStore`]. Invariants: exits with 0 only if all that was read came, and all that was written is durable at the other end.

#[path = "common/link.rs"]
mod link;
#[path = "common/terminal.rs"]
mod terminal;

use clap::{Parser, Subcommand};
use link::Link;
use pageferry::{FileStore, Grant, Identity, Mount, PageSize, PageStore, Peer, PeerId, Server, Trust};
use std::{
    error::Error,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

type Failure = Box<dyn Error + Send + Sync>;

/// Serves files in one terminal, and maps one of them as memory in another, on the same host or a far one.
///
/// First the key of the end that maps, then the files, then the map:
///   mount id --key guest.pem
///   mount serve --allow ID disk.img
///   mount map --key guest.pem ADDRESS ID disk.img
#[derive(Debug, Parser)]
#[command(version, verbatim_doc_comment)]
struct Command {
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Prints the id of a key, made if there is none
    Id {
        /// The file with the key
        #[arg(long, value_name = "FILE")]
        key: PathBuf,
    },
    /// Serves files, each by its name
    Serve {
        /// Files, or a directory whose files are served
        #[arg(required = true)]
        paths: Vec<PathBuf>,
        /// Who may map them
        #[arg(long, value_name = "ID", required = true)]
        allow: Vec<PeerId>,
        /// Lets them be written too
        #[arg(long)]
        writable: bool,
        #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:4433")]
        listen: SocketAddr,
    },
    /// Maps a file, reads all of it as memory, and prints its BLAKE3
    Map {
        /// Where it is served
        address: SocketAddr,
        /// The id of who serves it
        peer: PeerId,
        /// Its name
        name: String,
        /// The file with this end's key
        #[arg(long, value_name = "FILE")]
        key: PathBuf,
        /// Brings only what is touched
        #[arg(long)]
        direct: bool,
        /// Writes this text to the beginning of the file, and waits until it is durable there
        #[arg(long, value_name = "TEXT")]
        write: Option<String>,
        #[command(flatten)]
        link: Link,
    },
}

fn main() -> ExitCode {
    let command = Command::parse();
    let outcome = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().map_err(Failure::from);
    match outcome.and_then(|runtime| runtime.block_on(run(command.role))) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("mount: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(role: Role) -> Result<ExitCode, Failure> {
    match role {
        Role::Id { key } => println!("{}", identity(&key)?.peer_id()),
        Role::Serve { paths, allow, writable, listen } => return serve(&paths, &allow, writable, listen).await,
        Role::Map { address, peer, name, key, direct, write, link } => {
            let identity = identity(&key)?;
            let peer = Peer::builder(address, Trust::ids([peer]), &identity).transport(link.transport()).connect().await?;
            map(Arc::new(peer.open(&name).await?), &name, direct, write).await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn identity(key: &Path) -> Result<Identity, Failure> {
    if key.exists() {
        return Ok(Identity::load(key)?);
    }
    let made = Identity::generate()?;
    made.save(key)?;
    Ok(made)
}

async fn serve(paths: &[PathBuf], allow: &[PeerId], writable: bool, listen: SocketAddr) -> Result<ExitCode, Failure> {
    let identity = Identity::generate()?;
    let mut server = Server::builder(&identity);
    for file in files(paths)? {
        let named = |error: &dyn std::fmt::Display| format!("{}: {error}", file.display());
        let open = if writable { FileStore::open } else { FileStore::open_read_only };
        let name = file.file_name().and_then(|name| name.to_str()).ok_or_else(|| named(&"its name is no UTF-8"))?;
        let store = Arc::new(open(&file, PageSize::KIB_4).map_err(|error| named(&error))?);
        eprintln!("{name}: {} bytes", store.size());
        let grant = if writable { Grant::ReadWrite } else { Grant::Read };
        for peer in allow {
            server = server.grant_shared(*peer, name, store.clone(), grant);
        }
    }
    let server = server.listen(listen)?;
    eprintln!("served at {} by {}", server.local_addr(), identity.peer_id());
    Ok(terminal::interrupted("mount", "what was served").await)
}

/// The files named, and those in the directories named.
fn files(paths: &[PathBuf]) -> Result<Vec<PathBuf>, Failure> {
    let mut files = Vec::new();
    for path in paths {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        for entry in path.read_dir()? {
            let path = entry?.path();
            if path.is_file() {
                files.push(path);
            }
        }
    }
    Ok(files)
}

async fn map(store: Arc<dyn PageStore>, name: &str, direct: bool, write: Option<String>) -> Result<(), Failure> {
    let start = Instant::now();
    let mut mount = Mount::builder(store).name(name);
    if direct {
        mount = mount.direct();
    }
    if write.is_none() {
        mount = mount.read_only();
    }
    let mount = mount.open()?;
    let region = mount.region().clone();
    println!("{name} is memory after {}: {} bytes", terminal::time(start.elapsed()), region.size_bytes());

    if let Some(text) = &write {
        region.write_at(0, text.as_bytes())?;
        let pushed = mount.flush().await?;
        println!("wrote {} bytes; durable at the other end after {}", text.len(), terminal::time(pushed.took));
    }
    let reader = {
        let region = region.clone();
        // It waits for pages: not for a worker of the runtime.
        tokio::task::spawn_blocking(move || -> Result<blake3::Hash, pageferry::RegionError> {
            let (mut hasher, mut step) = (blake3::Hasher::new(), vec![0; 1 << 20]);
            let mut at = 0;
            while at < region.size_bytes() {
                let len = usize::try_from(region.size_bytes() - at).unwrap_or(usize::MAX).min(step.len());
                region.read_at(at, &mut step[..len])?;
                hasher.update(&step[..len]);
                at += len as u64;
            }
            Ok(hasher.finalize())
        })
    };
    let shows = async {
        loop {
            tokio::time::sleep(Duration::from_millis(500)).await;
            let progress = mount.progress();
            let left = progress.left.map_or_else(|| "?".to_owned(), terminal::time);
            eprintln!("{:5.1} % of {} pages are here, {left} to go", progress.percent(), progress.pages);
        }
    };
    let hash = tokio::select! {
        hash = reader => hash??,
        () = shows => unreachable!("it shows until the reader is done"),
    };
    let (stats, took) = (region.stats(), start.elapsed());
    let mb_s = region.size_bytes() as f64 / 1e6 / took.as_secs_f64();
    println!("read all of it in {} ({mb_s:.0} MB/s)", terminal::time(took));
    println!("pages pulled {}, brought by faults {}, beside them {}", stats.pages_pull, stats.pages_demand, stats.pages_around);
    println!("blake3 {hash}");
    mount.close().await?;
    Ok(())
}
