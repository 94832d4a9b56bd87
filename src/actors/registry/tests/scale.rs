//! Ten thousand clients. Its figures: `cargo test --release ten_thousand_clients_are_onboarded -- --nocapture`.

use futures_util::StreamExt as _;

use super::*;

#[actix_rt::test]
async fn heavy_ten_thousand_clients_are_onboarded_and_ready_again_after_a_restart() {
    const CLIENTS: usize = 10_000;
    let directory = tempfile::tempdir().expect("a temporary directory");
    let world = World::open(directory.path()).await;
    let before = crate::telemetry::process::read().resident_bytes;
    let begun = Instant::now();
    let creations = futures_util::stream::iter(0..CLIENTS).map(|n| {
        let registry = &world.registry;
        async move {
            let pattern = format!("fleet.{n}.#");
            registry.send(new_client(&format!("client-{n}"), &[&pattern])).await.expect("answers").expect("creates");
        }
    });
    creations.buffer_unordered(16).collect::<()>().await;
    let took = begun.elapsed();
    let resident = crate::telemetry::process::read().resident_bytes;
    println!("onboarded at {:.0}/s, 16 at once", CLIENTS as f64 / took.as_secs_f64());
    println!("resident {} MiB, {} MiB before", resident >> 20, before >> 20);
    let one = Instant::now();
    for n in 0..100 {
        world.create(&format!("single-{n}"), &["x"]).await;
    }
    println!("onboarded at {:.0}/s, one after the other", 100.0 / one.elapsed().as_secs_f64());
    let stop = Instant::now();
    world.close().await;
    println!("stopped in {} ms", stop.elapsed().as_millis());

    let begun = Instant::now();
    let world = World::open(directory.path()).await;
    println!("open after {} ms", begun.elapsed().as_millis());
    world.until_ready().await;
    println!("ready again after {} ms", begun.elapsed().as_millis());
    world.send("client-7", Some("fleet.42.x"), "1").await;
    assert_eq!(world.receive("client-42", 1).await, ["1"]);
    println!("resident {} MiB", crate::telemetry::process::read().resident_bytes >> 20);
    world.close().await;
}
