//! A cache whose process is killed, whose journal is cut and whose disk is full: what a flush acknowledged is there, and nothing else is made up.
//!
//! The same test binary, started again with [`CHILD`] set, is the process that is killed.

use pageferry::{CacheStore, Extent, FileStore, MemoryStore, PageSize, PageStore, StoreError};
use std::{
    env, fs,
    hash::{BuildHasher, Hasher, RandomState},
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

const CHILD: &str = "PAGEFERRY_CACHE_CHILD";
const PAGE: usize = 4096;
const PAGES: u64 = 400; // two chunks
const EACH: u64 = 24;

fn remote(directory: &Path) -> Arc<FileStore> {
    let path = directory.join("remote");
    let store = FileStore::open(&path, PageSize::KIB_4);
    Arc::new(store.or_else(|_| FileStore::create(path, PAGES * PAGE as u64, PageSize::KIB_4)).unwrap())
}

fn cache(directory: &Path) -> Result<CacheStore, StoreError> {
    CacheStore::builder(remote(directory), directory.join("cache")).push_every(None).open()
}

/// Which pages a round writes: follows from its number alone.
fn pages_of(round: u64) -> Vec<u64> {
    (0..EACH).map(|at| (round.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40).wrapping_add(at * at * 7) % PAGES).collect()
}

/// The round and the page, all over the page.
fn stamp(round: u64, page: u64) -> Vec<u8> {
    (round << 16 | page).to_le_bytes().repeat(PAGE / 8)
}

async fn round_in(store: &CacheStore, page: u64) -> u64 {
    let mut bytes = vec![0; PAGE];
    store.read_into(Extent::page(page), &mut bytes).await.unwrap();
    let words: Vec<u64> = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect();
    // Only a page that was being written may be of two rounds.
    assert!(words.iter().all(|word| *word == 0 || word & 0xffff == page), "page {page} holds another's bytes");
    words.iter().map(|word| word >> 16).min().unwrap()
}

/// Not a test by itself: what the other tests start and kill.
#[tokio::test(flavor = "multi_thread")]
async fn child_that_writes_until_it_is_killed() {
    let Ok(arguments) = env::var(CHILD) else { return };
    let (first, directory) = arguments.split_once(' ').unwrap();
    let (cache, mut round) = (cache(Path::new(directory)).unwrap(), first.parse::<u64>().unwrap());
    loop {
        for page in pages_of(round) {
            cache.write(Extent::page(page), &stamp(round, page)).await.unwrap();
        }
        if round % 3 == 0 {
            cache.push().await.unwrap()
        } else {
            cache.flush().await.unwrap()
        }
        // One write(2): the parent sees it whole or not at all.
        std::io::stderr().write_all(format!("durable {round}\n").as_bytes()).unwrap();
        cache.read(Extent::between(round % PAGES, PAGES.min(round % PAGES + 40))).await.unwrap();
        round += 1;
    }
}

/// Killed with the test that started it.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_is_killed_at_any_moment_loses_nothing_that_was_flushed() {
    let seed = env::var("PAGEFERRY_SEED").map_or_else(|_| RandomState::new().build_hasher().finish(), |seed| seed.parse().unwrap());
    println!("PAGEFERRY_SEED={seed}");
    let directory = tempfile::tempdir().unwrap();
    let (mut durable, mut random) = (0, seed | 1);
    for kill in 0..25 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "child_that_writes_until_it_is_killed", "--nocapture"])
            .env(CHILD, format!("{} {}", durable + 1, directory.path().display()))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut child = Killed(child);
        let mut lines = BufReader::new(child.0.stderr.take().unwrap()).lines();
        for _ in 0..1 + (random >> 33) % 5 {
            let line = lines.next().expect("the child ended by itself").unwrap();
            durable = line.strip_prefix("durable ").unwrap_or_else(|| panic!("{line}")).parse().unwrap();
        }
        // No synchronisation: anywhere in the next rounds.
        std::thread::sleep(Duration::from_micros((random >> 20) % 8000));
        drop(child);
        // What it still said before it was gone.
        for line in lines.map_while(Result::ok) {
            durable = line.strip_prefix("durable ").map_or(durable, |round| round.parse().unwrap());
        }

        let cache = cache(directory.path()).unwrap();
        let mut least = [0; PAGES as usize];
        (1..=durable).for_each(|round| pages_of(round).into_iter().for_each(|page| least[page as usize] = round));
        for page in 0..PAGES {
            let held = round_in(&cache, page).await;
            assert!(
                held >= least[page as usize] && held <= durable + 1,
                "kill {kill}: page {page} is of round {held}, round {} was durable",
                least[page as usize]
            );
        }
        cache.push().await.unwrap();
        let mut there = vec![0; PAGE];
        for page in 0..PAGES {
            remote(directory.path()).read_into(Extent::page(page), &mut there).await.unwrap();
            let mut here = vec![0; PAGE];
            cache.read_into(Extent::page(page), &mut here).await.unwrap();
            assert!(here == there, "kill {kill}: page {page} differs from the remote store's after a push");
        }
        // Fetches that keep their pages hold the files; each page was read, so all come.
        while cache.status().cached_pages < PAGES {
            tokio::task::yield_now().await;
        }
        drop(cache);
        while let Err(error) = CacheStore::builder(remote(directory.path()), directory.path().join("cache")).push_every(None).open()
        {
            assert!(error.to_string().contains("has this cache open"), "{error}");
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_journal_cut_at_any_byte_gives_what_was_durable_then() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("cache");
    let journal = directory.path().join("cache.journal");
    let remote = MemoryStore::from_bytes(vec![1; 8 * PAGE], PageSize::KIB_4);
    let open = || CacheStore::builder(Arc::new(remote.clone()), &path).push_every(None).open();
    let mut ends = Vec::new();
    {
        let cache = open().unwrap();
        for page in 0..4u8 {
            ends.push(fs::metadata(&journal).unwrap().len());
            cache.write(Extent::page(page.into()), &[page + 10; PAGE]).await.unwrap();
            cache.flush().await.unwrap();
        }
        ends.push(fs::metadata(&journal).unwrap().len());
    }
    let (data, whole) = (fs::read(&path).unwrap(), fs::read(&journal).unwrap());
    for cut in 0..=whole.len() {
        fs::write(&path, &data).unwrap();
        fs::write(&journal, &whole[..cut]).unwrap();
        let flushed = ends.iter().filter(|end| **end <= cut as u64).count();
        if flushed == 0 {
            // The header and the first record come with the file's name, whole: this is no crash. What has no record is not believed.
            if let Ok(cache) = open() {
                assert_eq!(cache.status().cached_pages, 0, "cut at {cut}");
            }
            continue;
        }
        let cache = open().unwrap();
        assert_eq!(cache.status().dirty_pages, flushed as u64 - 1, "cut at {cut}");
        for page in 0..flushed as u64 - 1 {
            let mut bytes = vec![0; PAGE];
            cache.read_into(Extent::page(page), &mut bytes).await.unwrap();
            assert_eq!(bytes, vec![page as u8 + 10; PAGE], "page {page}, cut at {cut}");
        }
    }
    // Damage in the middle could hide a write.
    let mut damaged = whole.clone();
    damaged[ends[2] as usize - 3] ^= 4;
    fs::write(&path, &data).unwrap();
    fs::write(&journal, &damaged).unwrap();
    let text = open().unwrap_err().to_string();
    assert!(text.contains(&format!("byte {} begins a damaged record, and byte {}", ends[1], ends[2])), "{text}");
    assert!(text.contains("remove both to begin anew"), "{text}");
}

/// A small file system in memory, for those who may mount one.
struct Small(tempfile::TempDir);

impl Small {
    fn mount(options: &str) -> Option<Small> {
        let directory = tempfile::tempdir().unwrap();
        let small = Small(directory);
        small.mount_with(options).then_some(small)
    }

    fn mount_with(&self, options: &str) -> bool {
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", options, "pageferry-test"]).arg(self.0.path()).stderr(Stdio::null());
        mount.status().is_ok_and(|status| status.success())
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).stderr(Stdio::null()).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_fails_a_write_and_nothing_else() {
    let Some(small) = Small::mount("size=256k") else {
        eprintln!("SKIPPED: a tmpfs cannot be mounted here; run as root");
        return;
    };
    let remote = MemoryStore::from_bytes(vec![1; 512 * PAGE], PageSize::KIB_4);
    let open = || CacheStore::builder(Arc::new(remote.clone()), small.0.path().join("cache")).push_every(None).open();
    let cache = open().unwrap();
    let mut written = 0;
    let error = loop {
        match cache.write(Extent::page(written), &[written as u8 + 2; PAGE]).await {
            Ok(()) if written == 40 => {
                cache.flush().await.unwrap();
                written += 1;
            }
            Ok(()) => written += 1,
            Err(error) => break error,
        }
    };
    assert!(written > 40 && error.to_string().contains("No space left on device"), "after {written}: {error}");
    let mut bytes = vec![0; PAGE];
    for page in 0..512 {
        cache.read_into(Extent::page(page), &mut bytes).await.unwrap();
        assert_eq!(bytes, vec![if page < written { page as u8 + 2 } else { 1 }; PAGE], "page {page}");
    }
    assert!(cache.status().keep_error.is_some());
    assert!(small.mount_with("remount,size=4m"));
    cache.write(Extent::page(written), &[9; PAGE]).await.unwrap();
    cache.push().await.unwrap();
    for page in 0..512 {
        remote.read_into(Extent::page(page), &mut bytes).await.unwrap();
        let expected = if page < written { page as u8 + 2 } else { 1 };
        assert_eq!(bytes[0], if page == written { 9 } else { expected }, "page {page}");
    }
    drop(cache);
}
