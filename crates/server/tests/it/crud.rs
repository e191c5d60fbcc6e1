//! What each resource does when nobody is in the way.

use axum::http::Method;
use serde_json::{Value, json};

use crate::in_both_modes;
use crate::support::{Api, MAIN};

in_both_modes!(
    tenants,
    workspaces,
    a_workspace_that_comes_back_has_higher_tokens,
    default_config,
    keys_may_have_any_name_and_any_value,
    batches,
    contexts,
    config_and_resolve,
    versions_and_restore,
    if_match,
    lists_are_paged_oldest_first,
    what_cannot_be_read_or_breaks_a_rule,
);

async fn tenants(api: Api) {
    let made = api
        .post("/v1/tenants", json!({"id": "zeta", "name": "Zeta"}))
        .await
        .is(201);
    assert_eq!(
        (made["id"].as_str(), made["name"].as_str()),
        (Some("zeta"), Some("Zeta"))
    );
    let created_at = made["created_at"].as_str().unwrap();
    assert!(
        created_at.len() == 27 && created_at.ends_with('Z'),
        "six decimals and Z: {created_at}"
    );

    api.post("/v1/tenants", json!({"id": "zeta"}))
        .await
        .problem(409, "already_exists");
    assert_eq!(api.get("/v1/tenants/zeta").await.is(200), made);
    let list = api.get("/v1/tenants").await.is(200);
    let ids: Vec<_> = list["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|tenant| tenant["id"].clone())
        .collect();
    assert_eq!(ids, ["acme", "globex", "zeta"]);
    assert_eq!(list["next_cursor"], Value::Null);

    let refused = api
        .delete("/v1/tenants/acme")
        .await
        .problem(422, "invalid_request");
    assert_eq!(refused["errors"][0]["field"], "tenant");
    // What is still to be told of it, and what could not be told, goes with it.
    let leftovers = "
        INSERT INTO leasehold.outbox (tenant_id, type, data) VALUES ('zeta', 'test', '{}');
        INSERT INTO leasehold.work_items
            (tenant_id, kind, scope_type, scope_id, priority, event_at, max_attempts)
        VALUES ('zeta', 'test', 'test', 'test', 100, clock_timestamp(), 10);
        INSERT INTO leasehold.dead_letters
            (tenant_id, kind, scope_type, scope_id, priority, event_at, max_attempts, attempt_count, last_error)
        VALUES ('zeta', 'test', 'test', 'test', 100, clock_timestamp(), 10, 10, 'error')";
    let client = api.client().await;
    client.batch_execute(leftovers).await.unwrap();
    api.delete("/v1/tenants/zeta").await.is(204);
    let left = "SELECT (SELECT count(*) FROM leasehold.outbox WHERE tenant_id = 'zeta')
                     + (SELECT count(*) FROM leasehold.work_items WHERE tenant_id = 'zeta')
                     + (SELECT count(*) FROM leasehold.dead_letters WHERE tenant_id = 'zeta')";
    assert_eq!(client.query_one(left, &[]).await.unwrap().get::<_, i64>(0), 0);
    api.get("/v1/tenants/zeta").await.problem(404, "not_found");
    api.delete("/v1/tenants/zeta").await.problem(404, "not_found");

    // Nor does the next one of that name meet the locks of this one, but tokens above theirs.
    let mut last = 0;
    for _ in 0..2 {
        api.post("/v1/tenants", json!({"id": "zeta"})).await.is(201);
        for lock in ["a", "b"] {
            let acquire = format!("/v1/tenants/zeta/locks/{lock}/acquire");
            let granted = api.post(&acquire, json!({"ttl_ms": 60_000})).await.is(200);
            let token = granted["fencing_token"].as_i64().unwrap();
            assert!(token > last, "{granted}");
        }
        let kept = json!({"ttl_ms": 60_000});
        let kept = api.post("/v1/tenants/acme/locks/a/acquire", kept).await.is(200);
        api.delete("/v1/tenants/zeta").await.is(204);
        let release = json!({"lock_id": kept["lock_id"]});
        let released = api.post("/v1/tenants/acme/locks/a/release", release).await;
        assert_eq!(released.is(200)["released"], true);
        let highest = "SELECT floor FROM leasehold.token_floor";
        last = client.query_one(highest, &[]).await.unwrap().get::<_, i64>(0);
    }
}

async fn workspaces(api: Api) {
    let list = "/v1/tenants/acme/workspaces";
    let made = api
        .post(list, json!({"name": "plan", "description": "a plan"}))
        .await
        .is(201);
    assert_eq!(
        (
            &made["tenant_id"],
            &made["name"],
            &made["description"],
            &made["version"]
        ),
        (&json!("acme"), &json!("plan"), &json!("a plan"), &json!(0))
    );
    api.post(list, json!({"name": "plan"}))
        .await
        .problem(409, "already_exists");
    let plan = format!("{list}/plan");
    let got = api.get(&plan).await.is(200);
    assert_eq!(got, made);
    assert_eq!(got.get("workspace_lock"), None, "nobody holds it");

    let patched = api.patch(&plan, json!({"description": "another"})).await.is(200);
    assert_eq!(
        (&patched["description"], &patched["version"]),
        (&json!("another"), &json!(0))
    );
    assert_eq!(
        api.patch(&plan, json!({})).await.is(200),
        patched,
        "an empty patch changes nothing"
    );
    assert_eq!(
        api.patch(&plan, json!({"description": null})).await.is(200)["description"],
        Value::Null
    );
    assert_eq!(
        api.get(&format!("{plan}/versions")).await.is(200)["items"],
        json!([]),
        "none of it makes a version"
    );

    api.put(&format!("{plan}/default-config/a"), json!({"value": 1}))
        .await
        .is(200);
    api.delete(&plan).await.is(204);
    for gone in [
        "",
        "/default-config",
        "/default-config/a",
        "/contexts",
        "/versions",
        "/versions/1",
        "/config",
        "/lock",
    ] {
        api.get(&format!("{plan}{gone}")).await.problem(404, "not_found");
    }
    api.delete(&plan).await.problem(404, "not_found");
    api.patch(&plan, json!({"description": "x"}))
        .await
        .problem(404, "not_found");
}

async fn a_workspace_that_comes_back_has_higher_tokens(api: Api) {
    let token = async || {
        api.put(&format!("{MAIN}/default-config/a"), json!({"value": 1}))
            .await
            .is(200);
        api.get(&format!("{MAIN}/versions/1")).await.is(200)["fencing_token"]
            .as_i64()
            .unwrap()
    };
    let before = token().await;
    api.delete(MAIN).await.is(204);
    api.post("/v1/tenants/acme/workspaces", json!({"name": "main"}))
        .await
        .is(201);
    let after = token().await;
    assert!(after > before, "{after} > {before}");
}

async fn default_config(api: Api) {
    let color = format!("{MAIN}/default-config/color");
    api.get(&color).await.problem(404, "not_found");
    let put = api
        .put(&color, json!({"value": "blue", "description": "of the sky"}))
        .await
        .is(200);
    assert_eq!(
        put,
        json!({"key": "color", "value": "blue", "description": "of the sky", "version": 1})
    );
    assert_eq!(api.get(&color).await.is(200), put);
    let same = api.put(&color, json!({"value": "blue"})).await.is(200);
    assert_eq!(
        (&same["version"], &same["description"]),
        (&json!(2), &Value::Null),
        "also when nothing changes"
    );
    assert_eq!(
        api.get(&format!("{MAIN}/default-config")).await.is(200)["items"],
        json!([same])
    );

    assert_eq!(
        api.delete(&color).await.is(200),
        json!({"key": "color", "version": 3})
    );
    api.delete(&color).await.problem(404, "not_found");
    assert_eq!(
        api.get(MAIN).await.is(200)["version"],
        3,
        "deleting nothing makes no version"
    );
}

async fn keys_may_have_any_name_and_any_value(api: Api) {
    let longest = "k".repeat(128);
    for key in ["batch", "A.b_c-9", ".", &longest] {
        let path = format!("{MAIN}/default-config/{key}");
        let put = api.put(&path, json!({"value": {"is": key}})).await.is(200);
        assert_eq!((&put["key"], &put["value"]["is"]), (&json!(key), &json!(key)));
        assert_eq!(api.get(&path).await.is(200), put);
    }
    let path = format!("{MAIN}/default-config/any");
    for value in [
        json!(null),
        json!(false),
        json!(-1.5e300),
        json!(u64::MAX),
        json!(["é", {"": []}]),
        json!("\\u0000"),
    ] {
        assert_eq!(
            api.put(&path, json!({"value": value})).await.is(200)["value"],
            value
        );
        assert_eq!(api.get(&path).await.is(200)["value"], value);
    }
    api.delete(&format!("{MAIN}/default-config/batch")).await.is(200);
    for bad in ["a%20b", "a%2Fb", &"k".repeat(129), "%C3%A9", "%00"] {
        let path = format!("{MAIN}/default-config/{bad}");
        api.put(&path, json!({"value": 1}))
            .await
            .problem(400, "invalid_request");
    }
}

async fn batches(api: Api) {
    let batch = format!("{MAIN}/default-config/batch");
    let send = async |operations: Value| api.post(&batch, json!({"operations": operations})).await;
    let values = async || api.get(&format!("{MAIN}/config")).await.is(200)["values"].clone();

    let done = send(json!([
        {"op": "put", "key": "a", "value": 1},
        {"op": "put", "key": "b", "value": 2, "description": "two"},
        {"op": "put", "key": "a", "value": 3},
        {"op": "delete", "key": "b"},
        {"op": "put", "key": "b", "value": 4},
    ]))
    .await
    .is(200);
    assert_eq!(done, json!({"version": 1, "applied": 5}));
    assert_eq!(values().await, json!({"a": 3, "b": 4}));

    // All or nothing, and every bad operation is named.
    let bad = send(json!([
        {"op": "put", "key": "c", "value": 1},
        {"op": "delete", "key": "missing"},
        {"op": "delete", "key": "a"},
        {"op": "delete", "key": "a"},
    ]))
    .await
    .problem(422, "invalid_request");
    let fields: Vec<_> = bad["errors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|error| error["field"].clone())
        .collect();
    assert_eq!(fields, ["operations[1]", "operations[3]"]);
    assert_eq!(values().await, json!({"a": 3, "b": 4}));
    assert_eq!(api.get(MAIN).await.is(200)["version"], 1);

    let many = |count: usize| {
        (0..count)
            .map(|n| json!({"op": "put", "key": format!("k{n}"), "value": n}))
            .collect()
    };
    send(many(0)).await.problem(422, "invalid_request");
    send(many(1_001)).await.problem(422, "invalid_request");
    assert_eq!(
        send(many(1_000)).await.is(200),
        json!({"version": 2, "applied": 1000})
    );
    let first = api.get(&format!("{MAIN}/default-config?limit=3")).await.is(200);
    let keys: Vec<_> = first["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| entry["key"].clone())
        .collect();
    assert_eq!(
        keys,
        ["a", "b", "k0"],
        "new keys are made in the order of the operations"
    );

    for (operation, field) in [
        (json!({"op": "put", "key": "a b", "value": 1}), "operations[0]"),
        (json!({"op": "put", "key": "a"}), "operations[0]"),
        (json!({"op": "upsert", "key": "a", "value": 1}), "operations[0]"),
        (json!({"op": "delete", "key": "a", "value": 1}), "operations[0]"),
    ] {
        let problem = send(json!([operation])).await.problem(422, "invalid_request");
        assert!(
            problem["errors"][0]["field"].as_str().unwrap().starts_with(field),
            "{problem:#}"
        );
    }
}

async fn contexts(api: Api) {
    let list = format!("{MAIN}/contexts");
    api.put(&format!("{MAIN}/default-config/color"), json!({"value": "grey"}))
        .await
        .is(200);
    let new = json!({"condition": {"city": "Bonn"}, "overrides": {"color": "red"}, "priority": 7});
    let made = api.post(&list, new).await.is(201);
    let id = made["id"].as_str().unwrap();
    assert_eq!(
        (&made["priority"], &made["version"], &made["condition"]["city"]),
        (&json!(7), &json!(2), &json!("Bonn"))
    );
    let one = format!("{list}/{id}");

    let unknown = json!({"condition": {}, "overrides": {"colour": 1, "color": 2, "size": 3}});
    let problem = api
        .post(&list, unknown.clone())
        .await
        .problem(422, "invalid_request");
    let fields: Vec<_> = problem["errors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|error| error["field"].clone())
        .collect();
    assert_eq!(fields, ["overrides.colour", "overrides.size"]);
    api.put(&one, unknown).await.problem(422, "invalid_request");

    let changed = api
        .put(&one, json!({"condition": {}, "overrides": {"color": "green"}}))
        .await
        .is(200);
    assert_eq!(
        changed,
        json!({"id": id, "condition": {}, "overrides": {"color": "green"}, "priority": 0, "version": 3})
    );
    assert_eq!(api.get(&list).await.is(200)["items"], json!([changed]));

    // A key that a context overrides must stay.
    let color = format!("{MAIN}/default-config/color");
    api.delete(&color).await.problem(422, "invalid_request");
    let operations = json!({"operations": [{"op": "delete", "key": "color"}]});
    let problem = api
        .post(&format!("{MAIN}/default-config/batch"), operations)
        .await
        .problem(422, "invalid_request");
    assert_eq!(problem["errors"][0]["field"], "operations[0]");

    assert_eq!(api.delete(&one).await.is(200), json!({"id": id, "version": 4}));
    api.delete(&one).await.problem(404, "not_found");
    api.put(&one, json!({"condition": {}, "overrides": {}}))
        .await
        .problem(404, "not_found");
    api.delete(&color).await.is(200);
    api.put(&format!("{list}/7"), json!({"condition": {}, "overrides": {}}))
        .await
        .problem(400, "invalid_request");
}

async fn config_and_resolve(api: Api) {
    let config = format!("{MAIN}/config");
    let empty = api.get(&config).await;
    assert_eq!(empty.header("etag"), Some("\"0\""));
    assert_eq!(empty.is(200), json!({"version": 0, "values": {}}));

    api.put(&format!("{MAIN}/default-config/color"), json!({"value": "grey"}))
        .await
        .is(200);
    let overrides = |color: &str| json!({"color": color});
    let contexts = format!("{MAIN}/contexts");
    api.post(
        &contexts,
        json!({"condition": {"city": "Bonn"}, "overrides": overrides("red")}),
    )
    .await
    .is(201);
    api.post(
        &contexts,
        json!({"condition": {"city": "Bonn", "n": 1}, "overrides": overrides("blue")}),
    )
    .await
    .is(201);

    let answer = api.get(&config).await;
    assert_eq!(answer.header("etag"), Some("\"3\""));
    assert_eq!(answer.is(200), json!({"version": 3, "values": {"color": "grey"}}));
    for (tags, status) in [
        ("\"3\"", 304),
        ("W/\"3\"", 304),
        ("\"1\", \"3\"", 304),
        ("*", 304),
        ("\"2\"", 200),
        ("3", 200),
    ] {
        let answer = api
            .send(Method::GET, &config, &[("if-none-match", tags)], None)
            .await;
        assert_eq!(
            (answer.status, answer.header("etag")),
            (status, Some("\"3\"")),
            "{tags}"
        );
        assert_eq!(answer.body == json!(""), status == 304, "a 304 has no body");
    }

    for (context, color) in [
        (json!({}), "grey"),
        (json!({"city": "Ulm"}), "grey"),
        (json!({"city": "Bonn"}), "red"),
        (json!({"city": "Bonn", "n": 1.0}), "blue"),
    ] {
        let resolved = api
            .post(&format!("{MAIN}/resolve"), json!({"context": context}))
            .await
            .is(200);
        assert_eq!(
            resolved,
            json!({"version": 3, "values": {"color": color}}),
            "{context}"
        );
    }
    api.post(&format!("{MAIN}/resolve"), json!({}))
        .await
        .problem(422, "invalid_request");
    api.post("/v1/tenants/acme/workspaces/none/resolve", json!({"context": {}}))
        .await
        .problem(404, "not_found");
}

async fn versions_and_restore(api: Api) {
    let put = async |key: &str, value: Value| {
        let body = json!({"value": value, "description": format!("about {key}")});
        api.put(&format!("{MAIN}/default-config/{key}"), body)
            .await
            .is(200)
    };
    let snapshot = async |n: i64| api.get(&format!("{MAIN}/versions/{n}")).await.is(200)["snapshot"].clone();
    put("a", json!(1)).await;
    put("b", json!({"x": null})).await;
    for color in ["red", "green"] {
        let context = json!({"condition": {"c": color}, "overrides": {"a": color}, "priority": 1});
        api.post(&format!("{MAIN}/contexts"), context).await.is(201);
    }
    let then = snapshot(4).await;
    assert_eq!(then["default_config"], json!({"a": 1, "b": {"x": null}}));
    assert_eq!(then["contexts"][1]["overrides"], json!({"a": "green"}));

    put("c", json!(3)).await;
    put("a", json!(2)).await;
    for context in api.get(&format!("{MAIN}/contexts")).await.is(200)["items"]
        .as_array()
        .unwrap()
    {
        api.delete(&format!("{MAIN}/contexts/{}", context["id"].as_str().unwrap()))
            .await
            .is(200);
    }
    assert_ne!(snapshot(8).await, then);
    let restored = api
        .send(Method::POST, &format!("{MAIN}/versions/4/restore"), &[], None)
        .await
        .is(200);
    assert_eq!(restored["version"], 9);
    assert_eq!(
        snapshot(9).await,
        then,
        "equal to the old one, with the order and the ids of the contexts"
    );
    let keys = api.get(&format!("{MAIN}/default-config")).await.is(200);
    assert_eq!(
        keys["items"][0],
        json!({"key": "a", "value": 1, "description": "about a", "version": 9})
    );
    assert_eq!(api.get(&format!("{MAIN}/config")).await.is(200)["values"]["a"], 1);

    for (n, status) in [
        ("10", 404),
        ("0", 404),
        ("-1", 404),
        ("x", 400),
        ("99999999999999999999", 400),
    ] {
        assert_eq!(
            api.get(&format!("{MAIN}/versions/{n}")).await.status,
            status,
            "{n}"
        );
        let restore = format!("{MAIN}/versions/{n}/restore");
        assert_eq!(
            api.send(Method::POST, &restore, &[], None).await.status,
            status,
            "{n}"
        );
    }
    let list = api.get(&format!("{MAIN}/versions")).await.is(200);
    let numbers: Vec<_> = list["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|version| version["version"].clone())
        .collect();
    assert_eq!(numbers, [1, 2, 3, 4, 5, 6, 7, 8, 9]);
    let last = &list["items"][8];
    assert_eq!(
        (&last["author"], &last["operation"]),
        (&json!("root"), &json!(format!("POST {MAIN}/versions/4/restore")))
    );
    assert_eq!(last.get("snapshot"), None);
    let tokens: Vec<_> = list["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|version| version["fencing_token"].as_i64().unwrap())
        .collect();
    assert!(
        tokens.windows(2).all(|pair| pair[0] < pair[1]),
        "tokens grow: {tokens:?}"
    );
}

async fn if_match(api: Api) {
    let color = format!("{MAIN}/default-config/color");
    let put = async |tags: &str| {
        let body = json!({"value": 1}).to_string();
        api.send(Method::PUT, &color, &[("if-match", tags)], Some(body))
            .await
    };
    put("\"1\"").await.problem(412, "version_mismatch");
    put("\"0\"").await.is(200);
    put("\"0\"").await.problem(412, "version_mismatch");
    put("W/\"1\"").await.problem(412, "version_mismatch");
    put("*").await.is(200);
    put("\"1\", \"2\"").await.is(200);
    put("3").await.problem(400, "invalid_request");

    let stale = [("if-match", "\"1\"")];
    let send = async |method, path: String, body: Option<Value>| {
        api.send(method, &path, &stale, body.map(|body| body.to_string()))
            .await
            .problem(412, "version_mismatch")
    };
    let id = "00000000-0000-0000-0000-000000000000";
    let context = json!({"condition": {}, "overrides": {}});
    send(Method::PATCH, MAIN.to_owned(), Some(json!({"description": "x"}))).await;
    send(Method::DELETE, MAIN.to_owned(), None).await;
    send(Method::DELETE, color.clone(), None).await;
    // 412 comes before the 404 of what is in the workspace.
    send(Method::DELETE, format!("{MAIN}/default-config/missing"), None).await;
    send(
        Method::PUT,
        format!("{MAIN}/contexts/{id}"),
        Some(context.clone()),
    )
    .await;
    send(Method::DELETE, format!("{MAIN}/contexts/{id}"), None).await;
    send(Method::POST, format!("{MAIN}/contexts"), Some(context)).await;
    send(Method::POST, format!("{MAIN}/versions/77/restore"), None).await;
    let operations = json!({"operations": [{"op": "put", "key": "a", "value": 1}]});
    send(
        Method::POST,
        format!("{MAIN}/default-config/batch"),
        Some(operations),
    )
    .await;
    // And after that of the workspace.
    let elsewhere = "/v1/tenants/acme/workspaces/none/default-config/a";
    let body = Some(json!({"value": 1}).to_string());
    api.send(Method::PUT, elsewhere, &stale, body)
        .await
        .problem(404, "not_found");
    assert_eq!(api.get(MAIN).await.is(200)["version"], 3);
}

async fn lists_are_paged_oldest_first(api: Api) {
    for n in 0..7 {
        api.put(&format!("{MAIN}/default-config/k{}", 9 - n), json!({"value": n}))
            .await
            .is(200);
        api.post(
            &format!("{MAIN}/contexts"),
            json!({"condition": {}, "overrides": {}, "priority": n}),
        )
        .await
        .is(201);
        api.post("/v1/tenants", json!({"id": format!("t{}", 9 - n)}))
            .await
            .is(201);
        api.post(
            "/v1/tenants/acme/workspaces",
            json!({"name": format!("w{}", 9 - n)}),
        )
        .await
        .is(201);
    }
    let all = async |path: &str, member: &str| {
        let mut found = Vec::new();
        let mut next = format!("{path}?limit=3");
        loop {
            let page = api.get(&next).await.is(200);
            let items = page["items"].as_array().unwrap();
            assert!(items.len() <= 3);
            found.extend(items.iter().map(|item| item[member].clone()));
            let Some(cursor) = page["next_cursor"].as_str() else {
                break;
            };
            assert_eq!(items.len(), 3, "only the last page is short");
            next = format!("{path}?limit=3&cursor={cursor}");
        }
        found
    };
    assert_eq!(
        all(&format!("{MAIN}/default-config"), "key").await,
        ["k9", "k8", "k7", "k6", "k5", "k4", "k3"]
    );
    assert_eq!(
        all(&format!("{MAIN}/contexts"), "priority").await,
        [0, 1, 2, 3, 4, 5, 6]
    );
    let versions: Vec<Value> = (1..=14).map(Value::from).collect();
    assert_eq!(all(&format!("{MAIN}/versions"), "version").await, versions);
    assert_eq!(
        all("/v1/tenants", "id").await,
        ["acme", "globex", "t9", "t8", "t7", "t6", "t5", "t4", "t3"]
    );
    let names = all("/v1/tenants/acme/workspaces", "name").await;
    assert_eq!(names, ["main", "w9", "w8", "w7", "w6", "w5", "w4", "w3"]);

    for (query, status) in [
        ("limit=0", 422),
        ("limit=201", 422),
        ("limit=-1", 422),
        ("limit=x", 400),
        ("limit=", 400),
        ("cursor=x", 400),
        ("cursor=", 400),
        ("limit=200", 200),
    ] {
        let answer = api.get(&format!("{MAIN}/versions?{query}")).await;
        assert_eq!(answer.status, status, "{query}: {:#}", answer.body);
    }
}

async fn what_cannot_be_read_or_breaks_a_rule(api: Api) {
    let color = format!("{MAIN}/default-config/color");
    let put = async |body: &str| api.send(Method::PUT, &color, &[], Some(body.to_owned())).await;
    put("{").await.problem(400, "invalid_request");
    put("").await.problem(400, "invalid_request");
    put("{}").await.problem(422, "invalid_request");
    put("[]").await.problem(422, "invalid_request");
    put(r#"{"value":1,"valeu":1}"#)
        .await
        .problem(422, "invalid_request");
    put(r#"{"value":"\u0000"}"#).await.problem(422, "invalid_request");
    put(&json!({"value": 1, "description": "x".repeat(4097)}).to_string())
        .await
        .problem(422, "invalid_request");
    let text = [("content-type", "text/plain")];
    let body = Some(json!({"value": 1}).to_string());
    api.send(Method::PUT, &color, &text, body)
        .await
        .problem(415, "invalid_request");
    put(&json!({"value": "x".repeat(1024 * 1024)}).to_string())
        .await
        .problem(413, "invalid_request");
    let operations =
        |bytes: usize| json!({"operations": [{"op": "put", "key": "a", "value": "x".repeat(bytes)}]});
    let batch = format!("{MAIN}/default-config/batch");
    api.post(&batch, operations(2 * 1024 * 1024)).await.is(200);
    api.post(&batch, operations(8 * 1024 * 1024))
        .await
        .problem(413, "invalid_request");

    api.send(Method::POST, &color, &[], None)
        .await
        .problem(405, "method_not_allowed");
    api.get("/v2").await.problem(404, "not_found");
    for id in ["", "A", "a b", "-a", "é", &"a".repeat(64)] {
        let problem = api
            .post("/v1/tenants", json!({"id": id}))
            .await
            .problem(422, "invalid_request");
        assert_eq!(problem["errors"][0]["field"], "id");
        api.post("/v1/tenants/acme/workspaces", json!({"name": id}))
            .await
            .problem(422, "invalid_request");
    }
    api.get("/v1/tenants/acme/workspaces/A")
        .await
        .problem(400, "invalid_request");
    api.get("/v1/tenants/acme/workspaces/%FF")
        .await
        .problem(400, "invalid_request");
    assert_eq!(
        api.get(MAIN).await.is(200)["version"],
        1,
        "only the batch was written"
    );
}
