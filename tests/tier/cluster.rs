//! The tier in a cluster: one of its nodes has all values, whichever is given as the address, and another one has them later.

use super::*;

/// The nodes of a cluster. All of them but the replicas have slots.
struct Cluster {
    nodes: Vec<Store>,
    slot: String,
    /// Which node has the tier's slot.
    owner: usize,
}

async fn node() -> Store {
    let port = free_port();
    node_at(port, port, &[]).await
}

/// A node that the others reach at this port.
async fn node_at(port: u16, reached: u16, more: &[String]) -> Store {
    let bus = free_port().to_string();
    let options = ["--cluster-enabled", "yes", "--cluster-port", &bus, "--cluster-node-timeout", "1000", "--masterauth", ADMIN];
    let options: Vec<String> = options.map(str::to_owned).into_iter().chain(more.iter().cloned()).collect();
    let node = Store::start_at(port, &options).await;
    fs::write(node.folder.path().join("reached"), format!("{reached} {bus}")).unwrap();
    node
}

/// A node that speaks TLS to clients and to the others, with the certificate of this folder, and is known as localhost.
async fn node_over_tls(folder: &Path) -> (Store, u16) {
    let (port, tls) = (free_port(), free_port());
    let mut options = tls_options(folder, tls, None);
    let authority = folder.join("cert.pem").to_str().unwrap().to_owned();
    options.extend(["--tls-ca-cert-file".to_owned(), authority]);
    let known =
        ["--tls-cluster", "yes", "--cluster-announce-hostname", "localhost", "--cluster-preferred-endpoint-type", "hostname"];
    options.extend(known.map(str::to_owned));
    (node_at(port, tls, &options).await, tls)
}

impl Cluster {
    /// Three nodes that share the slots.
    async fn start() -> Self {
        Self::of([node().await, node().await, node().await]).await
    }

    async fn of(nodes: [Store; 3]) -> Self {
        let mut cluster = Self { nodes: nodes.into(), slot: String::new(), owner: 0 };
        let first = &cluster.nodes[0];
        let slot: u64 = first.does(&[b"CLUSTER", b"KEYSLOT", b"bg1:{tier}"]).await;
        cluster.slot = slot.to_string();
        for (index, (from, to)) in [(0, 5_000), (5_001, 11_000), (11_001, 16_383)].into_iter().enumerate() {
            let node = &cluster.nodes[index];
            let epoch = (index + 1).to_string();
            node.does::<()>(&[b"CLUSTER", b"SET-CONFIG-EPOCH", epoch.as_bytes()]).await;
            let (first_slot, last_slot) = (from.to_string(), to.to_string());
            node.does::<()>(&[b"CLUSTER", b"ADDSLOTSRANGE", first_slot.as_bytes(), last_slot.as_bytes()]).await;
            if (from..=to).contains(&slot) {
                cluster.owner = index;
            }
        }
        for node in &cluster.nodes[1..] {
            cluster.meets(node).await;
        }
        cluster.agrees().await;
        cluster
    }

    async fn meets(&self, node: &Store) {
        let reached = fs::read_to_string(node.folder.path().join("reached")).unwrap();
        let (port, bus) = reached.split_once(' ').unwrap();
        self.nodes[0].does::<()>(&[b"CLUSTER", b"MEET", b"127.0.0.1", port.as_bytes(), bus.as_bytes()]).await;
    }

    /// Waits until every node knows all nodes, and all slots are served.
    async fn agrees(&self) {
        let known = format!("cluster_known_nodes:{}\r\n", self.nodes.len());
        for node in &self.nodes {
            until("the cluster stands", async || {
                let info: String = node.does(&[b"CLUSTER", b"INFO"]).await;
                info.contains("cluster_state:ok") && info.contains(&known)
            })
            .await;
        }
    }

    fn owner(&self) -> &Store {
        &self.nodes[self.owner]
    }

    /// A node that has slots, and not the tier's.
    fn another(&self) -> &Store {
        &self.nodes[(self.owner + 1) % 3]
    }

    /// The way by these nodes, with the usual timeout of a request.
    fn way(&self, ports: Vec<u16>) -> Way {
        Way { nodes: ports, timeout: Duration::from_millis(350), ..self.owner().way() }
    }
}

async fn id(node: &Store) -> String {
    node.does(&[b"CLUSTER", b"MYID"]).await
}

/// The addresses name nodes that do not have the slot, and one that is away. All names are in one slot, under both keys and with all limits.
#[tokio::test(flavor = "multi_thread")]
async fn the_node_that_has_the_slot_is_found_and_followed() {
    let cluster = Cluster::start().await;
    let (owner, other) = (cluster.owner(), cluster.another());
    let third = cluster.nodes.iter().find(|node| node.port != owner.port && node.port != other.port).unwrap();
    let frozen = node().await;
    frozen.signal("-STOP");
    let keys = format!("made-up-next-key-fedcba9876543210fedcba98\n{KEY}");
    let way = Way { keys, ..cluster.way(vec![free_port(), frozen.port, other.port]) };
    let prober = Scripted::new(Verdict::Valid);
    let fleet: Vec<Replica> =
        (0..2).map(|_| limited(&way, &prober, FOUR, (calls_per_second(), NewKeyLimits::default()))).collect();
    until_they_share("first", &fleet[0], &fleet[1], &prober).await;
    assert!(refused(&fleet, "a", 150).await > 0);
    let names = owner.keys().await;
    for end in [":starts", ":turn"] {
        assert!(names.iter().any(|name| name.ends_with(end)), "{end}: {names:?}");
    }
    assert!(names.iter().all(|name| name.starts_with("bg1:{tier}")) && other.keys().await.is_empty(), "{names:?}");
    let in_slot: usize = owner.does(&[b"CLUSTER", b"COUNTKEYSINSLOT", cluster.slot.as_bytes()]).await;
    assert!(in_slot >= names.len() && third.keys().await.is_empty());
    for replica in &fleet {
        replica.page().is("byokgate_tier_damaged_total", 0.0);
    }

    // The slot moves, as redis-cli moves it, while the replicas go on.
    let [one, two] = [(), ()].map(|()| Replica::new(&cluster.way(vec![other.port]), &prober));
    until_they_share("one-and-two", &one, &two, &prober).await;
    until("all listen", async || owner.listeners().await == 4).await;
    let (from, to, slot) = (id(owner).await, id(third).await, cluster.slot.as_bytes());
    third.does::<()>(&[b"CLUSTER", b"SETSLOT", slot, b"IMPORTING", from.as_bytes()]).await;
    owner.does::<()>(&[b"CLUSTER", b"SETSLOT", slot, b"MIGRATING", to.as_bytes()]).await;
    for index in 0..3 {
        assert_eq!(one.ask(&format!("made-up-meanwhile-{index}")).await, ASKED, "it is as if there were no tier");
    }
    loop {
        let names: Vec<String> = owner.does(&[b"CLUSTER", b"GETKEYSINSLOT", slot, b"100"]).await;
        let Some(name) = names.first() else { break };
        let port = third.port.to_string();
        let mut words: Vec<&[u8]> = vec![b"MIGRATE", b"127.0.0.1", port.as_bytes(), name.as_bytes(), b"0", b"5000"];
        words.extend([b"REPLACE".as_slice(), b"AUTH", ADMIN.as_bytes()]);
        owner.does::<String>(&words).await;
    }
    for node in [third, owner, other] {
        node.does::<()>(&[b"CLUSTER", b"SETSLOT", slot, b"NODE", to.as_bytes()]).await;
    }
    until_they_share("moved", &one, &two, &prober).await;
    assert!(owner.keys().await.is_empty() && !third.keys().await.is_empty());
    until("both listen there", async || third.listeners().await >= 2).await;
    // What was found before the slot moved is still known.
    let late = Replica::new(&Way { keys: way.keys.clone(), ..cluster.way(vec![owner.port]) }, &prober);
    let asked = prober.asked();
    assert_eq!((late.ask("made-up-first-1").await.0, prober.asked()), (Verdict::Valid, asked));
}

/// Servers that are no cluster would each take a part of the replicas: none of them is used.
#[tokio::test]
async fn servers_that_are_no_cluster_are_as_no_store() {
    let (log, prober) = (Log::start(), Scripted::new(Verdict::Valid));
    let servers = [Store::start().await, Store::start().await];
    let nodes = servers.iter().map(|server| server.port).collect();
    let replica = Replica::new(&Way { nodes, ..servers[0].way() }, &prober);
    assert_eq!((replica.ask("made-up").await, replica.looks("fault")), (ASKED, 1.0));
    let events = log.events("tier_fault");
    assert!(events[0]["error"].as_str().unwrap().contains("not in cluster mode"), "{events:?}");
    for server in &servers {
        assert!(server.keys().await.is_empty());
    }
}

/// The node that has the slot dies, and its replica takes the slot over.
#[tokio::test(flavor = "multi_thread")]
async fn a_failover_in_a_cluster_is_followed() {
    for signal in ["-KILL", "-STOP"] {
        let mut cluster = Cluster::start().await;
        let replica = node().await;
        cluster.meets(&replica).await;
        cluster.nodes.push(replica);
        cluster.agrees().await;
        let replica = &cluster.nodes[3];
        replica.does::<()>(&[b"CLUSTER", b"REPLICATE", id(cluster.owner()).await.as_bytes()]).await;
        until("it follows", async || {
            let info: String = replica.does(&[b"INFO", b"replication"]).await;
            info.contains("master_link_status:up")
        })
        .await;
        let prober = Scripted::new(Verdict::Valid);
        // The owner is named first, and the replica, which refers to it.
        let ports = vec![cluster.owner().port, replica.port, cluster.another().port];
        let [one, other] = [(), ()].map(|()| Replica::new(&cluster.way(ports.clone()), &prober));
        until_they_share("first", &one, &other, &prober).await;
        until("both listen", async || cluster.owner().listeners().await == 2).await;
        cluster.owner().signal(signal);
        until_they_share("failover", &one, &other, &prober).await;
        assert!(replica.does::<String>(&[b"INFO", b"replication"]).await.contains("role:master"), "{signal}");
        until("both listen to the second", async || replica.listeners().await == 2).await;
    }
}

/// A node refers to another by its name and its port for TLS.
#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_is_reached_over_tls() {
    let folder = tempfile::tempdir().unwrap();
    let (trusted, _) = certificate(folder.path());
    let [(one, a), (two, b), (three, c)] =
        [node_over_tls(folder.path()).await, node_over_tls(folder.path()).await, node_over_tls(folder.path()).await];
    let cluster = Cluster::of([one, two, three]).await;
    let another = [a, b, c][(cluster.owner + 1) % 3];
    let prober = Scripted::new(Verdict::Valid);
    let way = Way { ca: Some(trusted), timeout: Duration::from_secs(2), ..cluster.way(vec![another]) };
    let [one, other] = [(), ()].map(|()| Replica::new(&way, &prober));
    // The names are gossip, and may come later than the rest.
    until_they_share("tls", &one, &other, &prober).await;
    until("both listen", async || cluster.owner().listeners().await == 2).await;
}
