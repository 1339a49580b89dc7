//! What becomes of threads that wait for pages when their server dies (S3): each loss policy gives them an answer within a bound.
//!
//! Method: the server is a process of its own, this test binary run again, and is killed with SIGKILL (or stopped with SIGSTOP) while it holds the
//! reads of faulting threads at a gate. It says when it holds them; nothing here sleeps.

#[path = "common/net.rs"]
mod common;

use common::*;
use pageferry::{
    Extent, FaultAround, Grant, Identity, Loss, LossPolicy, OnLoss, PageStore, Pager, PagerOptions, Peer, Region, RegionError,
    RegionEvent, Server, TransportOptions, Trust, Verdict, testing::Gated,
};
use std::{
    env,
    io::{BufRead, BufReader, Read, Write},
    net::SocketAddr,
    os::unix::process::ExitStatusExt,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

const PAGES: u64 = 256;
/// Threads that wait for a page each when the server is lost.
const THREADS: u64 = 8;

/// This test binary again, as another process that runs the one ignored test `role`.
struct Process {
    child: Child,
    /// Closed when this is dropped, which ends the process.
    _ends_it: std::process::ChildStdin,
    said: mpsc::Receiver<String>,
}

impl Process {
    fn start(role: &str, settings: &[(&str, String)]) -> Process {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--ignored", "--exact", role, "--nocapture", "--test-threads=1"]);
        command.envs(settings.iter().map(|(name, value)| (format!("PAGEFERRY_TEST_{name}"), value)));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (out, _ends_it) = (BufReader::new(child.stdout.take().unwrap()), child.stdin.take().unwrap());
        let (line, said) = mpsc::channel();
        thread::spawn(move || out.lines().map_while(Result::ok).try_for_each(|said| line.send(said)));
        Process { child, _ends_it, said }
    }

    /// Waits until it says `word`, and returns the rest of that line.
    fn until(&self, word: &str) -> String {
        loop {
            let line = self.said.recv_timeout(HANG).unwrap_or_else(|error| panic!("it did not say {word:?}: {error}"));
            if let Some(rest) = line.strip_prefix(word) {
                return rest.trim().to_owned();
            }
        }
    }

    /// SIGKILL: it says no goodbye.
    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGSTOP: it holds its port and says nothing more.
    fn stop(&self) {
        assert!(Command::new("kill").args(["-STOP", &self.child.id().to_string()]).status().unwrap().success());
    }

    fn wait(mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn setting(name: &str) -> String {
    env::var(format!("PAGEFERRY_TEST_{name}")).unwrap()
}

/// Ends this process with the one that started it.
fn end_with_parent() {
    thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(0);
    });
}

/// Serves the world; holds so many reads at a gate, says so, and lets nothing through. Holding none, its gate is open.
#[test]
#[ignore = "the server process of the other tests"]
fn server_process() {
    end_with_parent();
    let gated = Gated::new(world(PAGES));
    let identity = Identity::load(setting("IDENTITY")).unwrap();
    let server = Server::builder(&identity)
        .grant(setting("CLIENT").parse().unwrap(), "world", gated.clone(), Grant::Read)
        // Clients say how long a silence may be; the shorter of both counts.
        .transport(TransportOptions { idle_timeout: Duration::from_secs(60), ..impatient() })
        .listen(setting("LISTEN").parse().unwrap())
        .unwrap();
    say(&format!("listening {}", server.local_addr()));
    let hold: usize = setting("HOLD").parse().unwrap();
    if hold == 0 {
        gated.open();
    }
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
        if hold > 0 {
            gated.arrived(hold).await;
            say("holding");
        }
        std::future::pending::<()>().await
    });
}

/// Reads a page of a region that a server holds back, with the loss policy's default: poison.
#[test]
#[ignore = "the program that is killed by a poisoned page"]
fn program_process() {
    end_with_parent();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let identity = Identity::load(setting("IDENTITY")).unwrap();
    let trust = Trust::ids([setting("SERVER").parse().unwrap()]);
    let address = setting("LISTEN").parse().unwrap();
    let (_pager, region) = runtime.block_on(open(address, trust, &identity, soon_poison(), impatient()));
    let read = region.read_at(5 * PAGE as u64, &mut [0; 8]);
    panic!("the read came back with {read:?}");
}

/// One write a line: the harness prints on the same stream.
fn say(line: &str) {
    std::io::stdout().write_all(format!("\n{line}\n").as_bytes()).unwrap();
}

async fn open(
    address: SocketAddr,
    trust: Trust,
    identity: &Identity,
    loss: LossPolicy,
    options: TransportOptions,
) -> (Pager, Region) {
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    let peer = Peer::builder(address, trust, identity).transport(options).service(pager.service()).connect().await.unwrap();
    let store = peer.open("world").await.unwrap();
    let builder = Region::builder().name("world").store(store).pager(&pager);
    (pager.clone(), builder.fault_around(FaultAround::OFF).loss(loss).open().unwrap())
}

fn soon_poison() -> LossPolicy {
    LossPolicy { keep_trying: Duration::from_millis(300), ..LossPolicy::default() }
}

/// How long a thread may wait once its server is gone. With [`impatient`] options and 300 ms of trying it is some 3 s: the loss is noticed, and an
/// attempt to connect fails after each end of trying. The rest is room for a machine that stands still for seconds, as virtual ones do; the
/// default policy alone would take 30 s.
const BOUND: Duration = Duration::from_secs(15);

/// A server process and what its client needs.
struct Stage {
    keys: Keys,
    folder: tempfile::TempDir,
    address: SocketAddr,
}

impl Stage {
    /// The first server, which holds `hold` reads.
    fn start(hold: u64) -> (Stage, Process) {
        let mut stage = Stage { keys: Keys::new(), folder: tempfile::tempdir().unwrap(), address: LOOPBACK };
        stage.keys.server.save(stage.folder.path().join("server.pem")).unwrap();
        stage.keys.client.save(stage.folder.path().join("client.pem")).unwrap();
        let (server, address) = stage.server(hold);
        stage.address = address;
        (stage, server)
    }

    /// A server at the same address as the one before, with the same key.
    fn server(&self, hold: u64) -> (Process, SocketAddr) {
        let settings = [
            ("IDENTITY", self.folder.path().join("server.pem").to_str().unwrap().to_owned()),
            ("CLIENT", self.keys.client_id().to_string()),
            ("LISTEN", self.address.to_string()),
            ("HOLD", hold.to_string()),
        ];
        let server = Process::start("server_process", &settings);
        let address = server.until("listening ").parse().unwrap();
        (server, address)
    }

    async fn region(&self, loss: LossPolicy, options: TransportOptions) -> (Pager, Region) {
        open(self.address, Trust::ids([self.keys.server.peer_id()]), &self.keys.client, loss, options).await
    }
}

/// Threads that each read one page of the region, and fail unless it is right.
fn touch(region: &Region) -> Vec<thread::JoinHandle<()>> {
    let pages = (0..THREADS).map(|number| number * (PAGES / THREADS) + 4);
    pages
        .map(|page| {
            let region = region.clone();
            thread::spawn(move || {
                let mut bytes = vec![0; PAGE];
                region.read_at(page * PAGE as u64, &mut bytes).unwrap();
                assert!(bytes == content(page), "page {page} holds other bytes");
            })
        })
        .collect()
}

/// Joins threads within `bound` from `start` on.
#[track_caller]
fn join_within(start: Instant, bound: Duration, threads: Vec<thread::JoinHandle<()>>) {
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert!(start.elapsed() < bound, "the threads waited for {:?}, allowed are {bound:?}", start.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_comes_back_is_reconnected_to_and_no_page_is_lost() {
    if !userfaultfd() {
        return;
    }
    let (stage, server) = Stage::start(THREADS);
    let patient = LossPolicy { keep_trying: HANG, ..LossPolicy::default() };
    let (_pager, region) = stage.region(patient, impatient()).await;
    let mut events = region.events();
    let threads = touch(&region);
    server.until("holding");
    server.kill();
    let (_server, _) = stage.server(0);
    join_within(Instant::now(), BOUND, threads);
    assert!(matches!(events.try_recv(), Ok(RegionEvent::StoreAway { cause }) if cause.is_transient()));
    assert!(matches!(events.try_recv(), Ok(RegionEvent::StoreBack)));
    soon("the pull", region.pull()).await.unwrap();
    let mut bytes = vec![0; region.len()];
    region.read_at(0, &mut bytes).unwrap();
    assert!(bytes == contents(region.extent()));
    assert_eq!((region.residency().missing(), region.residency().lost), (0, 0));
}

/// The new server is not asked to wait for the old one's connections to time out: it tells their clients at once that they are gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_server_is_noticed_long_before_the_idle_time_out() {
    if !userfaultfd() {
        return;
    }
    let (stage, server) = Stage::start(THREADS);
    let idle_timeout = Duration::from_secs(60);
    let slow = TransportOptions { idle_timeout, answer_timeout: idle_timeout, ..impatient() };
    let (_pager, region) = stage.region(LossPolicy::default(), slow).await;
    let threads = touch(&region);
    server.until("holding");
    server.kill();
    let (_server, _) = stage.server(0);
    join_within(Instant::now(), BOUND, threads);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_goes_on_with_the_server_that_comes_back() {
    if !userfaultfd() {
        return;
    }
    let (stage, server) = Stage::start(1);
    let patient = LossPolicy { keep_trying: HANG, ..LossPolicy::default() };
    let (_pager, region) = stage.region(patient, impatient()).await;
    let pulling = tokio::spawn({
        let region = region.clone();
        async move { region.pull().await }
    });
    server.until("holding");
    let threads = touch(&region);
    server.kill();
    let (_server, _) = stage.server(0);
    soon("the pull", pulling).await.unwrap().unwrap();
    join_within(Instant::now(), BOUND, threads);
    let mut bytes = vec![0; region.len()];
    region.read_at(0, &mut bytes).unwrap();
    assert!(bytes == contents(region.extent()));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_store_answers_when_the_server_is_killed() {
    if !userfaultfd() {
        return;
    }
    let (stage, server) = Stage::start(THREADS);
    let loss = LossPolicy { then: OnLoss::Fallback(Arc::new(world(PAGES))), ..soon_poison() };
    let (_pager, region) = stage.region(loss, impatient()).await;
    let threads = touch(&region);
    server.until("holding");
    let start = Instant::now();
    server.kill();
    join_within(start, BOUND, threads);
    assert_eq!(region.residency().lost, 0);
}

/// The server's host hangs: no packet says so, and its port is not free either.
#[tokio::test(flavor = "multi_thread")]
async fn another_store_answers_when_the_server_hangs() {
    if !userfaultfd() {
        return;
    }
    let (stage, server) = Stage::start(THREADS);
    let loss = LossPolicy { then: OnLoss::Fallback(Arc::new(world(PAGES))), ..soon_poison() };
    let (_pager, region) = stage.region(loss, impatient()).await;
    let threads = touch(&region);
    server.until("holding");
    let start = Instant::now();
    server.stop();
    join_within(start, BOUND, threads);
    assert_eq!(region.residency().lost, 0);
}

/// Many who wait for the same silent server wait for one attempt to connect, not each for their own, one after the other.
#[tokio::test(flavor = "multi_thread")]
async fn many_reads_of_a_silent_server_fail_together() {
    let (stage, server) = Stage::start(0);
    let store = stage.keys.connect_with(stage.address, impatient()).await.open("world").await.unwrap();
    server.stop();
    // It may answer until the signal has reached it.
    let answers = async { while store.read(Extent::page(0)).await.is_ok() {} };
    soon("the loss", answers).await;
    let start = Instant::now();
    let reads = (0..40).map(|page| {
        let store = store.clone();
        tokio::spawn(async move { store.read(Extent::page(page)).await })
    });
    for read in reads.collect::<Vec<_>>() {
        assert!(soon("a read", read).await.unwrap().unwrap_err().is_transient());
    }
    assert!(start.elapsed() < 10 * impatient().connect_timeout, "{:?} for all", start.elapsed());
}

/// The program is asked, says to try longer once, and then names another store.
#[tokio::test(flavor = "multi_thread")]
async fn the_program_is_asked_what_to_do_and_obeyed() {
    if !userfaultfd() {
        return;
    }
    let (stage, server) = Stage::start(THREADS);
    let asked: Arc<Mutex<Vec<Loss>>> = Arc::default();
    let decide = {
        let (asked, spare) = (asked.clone(), Arc::new(world(PAGES)));
        move |loss: &Loss| {
            let mut asked = asked.lock().unwrap();
            asked.push(loss.clone());
            if asked.len() == 1 { Verdict::KeepTrying(Duration::from_millis(200)) } else { Verdict::Fallback(spare.clone()) }
        }
    };
    let loss = LossPolicy { then: OnLoss::Ask(Arc::new(decide)), ..soon_poison() };
    let (_pager, region) = stage.region(loss, impatient()).await;
    let threads = touch(&region);
    server.until("holding");
    let start = Instant::now();
    server.kill();
    join_within(start, BOUND, threads);
    let asked = asked.lock().unwrap();
    assert!(asked.len() >= 2, "asked {} times", asked.len());
    for Loss { region, extent, cause } in asked.iter() {
        assert!(region == "world" && extent.count() == 1 && cause.is_transient(), "{region} {extent} {cause}");
    }
}

/// Who has not touched the pages gets errors, and the region says what is lost; what had come stays.
#[tokio::test(flavor = "multi_thread")]
async fn poisoned_pages_are_errors_for_whoever_asks_first() {
    if !userfaultfd() {
        return;
    }
    let (stage, server) = Stage::start(2);
    let (_pager, region) = stage.region(soon_poison(), impatient()).await;
    let mut events = region.events();
    let waiting = tokio::spawn({
        let region = region.clone();
        async move { region.populate(0..PAGE as u64).await }
    });
    let pulling = tokio::spawn({
        let region = region.clone();
        async move { region.pull().await }
    });
    server.until("holding");
    let start = Instant::now();
    server.kill();
    for call in [waiting, pulling] {
        let error = soon("a call that waits for a lost page", call).await.unwrap().unwrap_err();
        assert!(matches!(&error, RegionError::Lost { cause, .. } if cause.is_transient()), "{error}");
    }
    assert!(start.elapsed() < BOUND, "{:?}", start.elapsed());
    let error = region.read_at(77, &mut [0]).unwrap_err();
    assert!(matches!(error, RegionError::Lost { extent, .. } if extent == Extent::page(0)), "{error}");
    assert_eq!(region.residency().lost, PAGES);
    assert!(matches!(events.try_recv(), Ok(RegionEvent::StoreAway { .. })));
    let mut told = Vec::new();
    while let Ok(event) = events.try_recv() {
        let RegionEvent::Lost { extent, .. } = event else { panic!("{event:?}") };
        told.extend(extent.pages());
    }
    told.sort_unstable();
    assert_eq!(told, (0..PAGES).collect::<Vec<_>>(), "each lost page is told of once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thread_that_waits_for_a_poisoned_page_gets_sigbus() {
    if !userfaultfd() {
        return;
    }
    let (stage, server) = Stage::start(1);
    let settings = [
        ("IDENTITY", stage.folder.path().join("client.pem").to_str().unwrap().to_owned()),
        ("SERVER", stage.keys.server.peer_id().to_string()),
        ("LISTEN", stage.address.to_string()),
    ];
    let program = Process::start("program_process", &settings);
    server.until("holding");
    let start = Instant::now();
    server.kill();
    let status = program.wait();
    let poison = pageferry::Capabilities::probe().poison();
    assert_eq!(status.signal(), Some(if poison { libc::SIGBUS } else { libc::SIGSEGV }), "{status}");
    assert!(start.elapsed() < BOUND, "{:?}", start.elapsed());
}
