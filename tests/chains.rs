//! Programs that go on before they have quite arrived, and memory that many take at once.

#[path = "common/net.rs"]
mod net;
#[path = "common/program.rs"]
mod program;

use net::{LOOPBACK, soon, userfaultfd};
use pageferry::{Grant, Identity, Peer, Region, RegionStore, Server, Strategy};
use program::{Keys, Ledger, Program, check, check_stamps, world};
use std::sync::Arc;

/// Each host is a destination, and a source while its own pages are still coming: what it lacks is asked for upstream.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_program_moves_on_before_its_pages_have_come() {
    if !userfaultfd() {
        return;
    }
    for strategy in [Strategy::post_copy(), Strategy::hybrid()] {
        let (keys, ledger) = (Keys::new(), Ledger::new());
        let mut regions = world(&["heap", "archive"], 512);
        let mut program = Program::start(&regions[..1], &ledger);
        let (mut hosts, mut epoch) = (Vec::new(), 1);
        for host in 0..4 {
            // Slower than the program moves: a page of the archive comes when it is asked for.
            let builder = keys.source(&regions, &program.gate).epoch(epoch).background_limit(1 << 20);
            let source = builder.listen(LOOPBACK).unwrap();
            ledger.advances().await;
            let destination = soon("connecting", keys.destination(source.local_addr()).connect()).await.unwrap();
            let first = Strategy::post_copy();
            let moved = soon("the move", destination.take(if host == 0 { first } else { strategy })).await.unwrap();
            if strategy == Strategy::post_copy() {
                assert!(moved.regions()[1].residency().missing() > 256, "host {host} has all: nothing was asked for upstream");
            }
            program.has_left();
            epoch = moved.epoch();
            regions = moved.regions().to_vec();
            program = Program::start(&regions[..1], &ledger);
            hosts.push((source, moved));
        }
        ledger.advances().await;
        assert_eq!(epoch, 5);
        // From here to there.
        for (source, moved) in &hosts {
            soon("the last page", moved.complete()).await.unwrap();
            soon("the departure", source.departed()).await.unwrap();
        }
        program.quit();
        check(&regions[..1], &ledger);
        check_stamps(&regions[1]);
    }
}

/// A region that nobody writes any more serves as many as like.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_take_one_frozen_region_at_once() {
    if !userfaultfd() {
        return;
    }
    const DESTINATIONS: usize = 64;
    let frozen = world(&["world"], 256).remove(0);
    let (ours, theirs) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let store: Arc<dyn pageferry::PageStore> = Arc::new(RegionStore::new(&frozen));
    let server = Server::builder(&ours).grant_shared(theirs.peer_id(), "world", store, Grant::Read);
    let server = server.listen(LOOPBACK).unwrap();
    let (address, id, theirs) = (server.local_addr(), ours.peer_id(), Arc::new(theirs));
    let taken = (0..DESTINATIONS).map(|_| {
        let theirs = theirs.clone();
        tokio::spawn(async move {
            let peer = soon("connecting", Peer::connect(address, id, &theirs)).await.unwrap();
            let region = Region::builder().store(peer.open("world").await.unwrap()).open().unwrap();
            soon("the pull", region.pull()).await.unwrap();
            region
        })
    });
    let taken: Vec<_> = taken.collect();
    for region in taken {
        check_stamps(&region.await.unwrap());
    }
}
