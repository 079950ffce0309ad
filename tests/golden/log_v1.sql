BEGIN TRANSACTION;
CREATE TABLE log_delta (
            session TEXT NOT NULL, turn INTEGER NOT NULL, part INTEGER NOT NULL, n INTEGER NOT NULL, text TEXT NOT NULL,
            PRIMARY KEY (session, turn, part, n)
        ) WITHOUT ROWID;
INSERT INTO "log_delta" VALUES('ses_aaa',1,1,0,'stream');
CREATE TABLE log_entry (
            session TEXT NOT NULL, position INTEGER NOT NULL, kind TEXT NOT NULL, turn INTEGER NOT NULL,
            ref TEXT NOT NULL, key TEXT NOT NULL, epoch INTEGER NOT NULL, code_version TEXT NOT NULL, ts REAL NOT NULL,
            schema INTEGER NOT NULL, mark INTEGER, size INTEGER NOT NULL, blob TEXT NOT NULL, body TEXT,
            PRIMARY KEY (session, position)
        );
INSERT INTO "log_entry" VALUES('ses_aaa',1,'user',0,'','m1',1,'v1',1700000000.0,1,NULL,17,'','{"text":"héllo"}');
INSERT INTO "log_entry" VALUES('ses_aaa',2,'turn.start',1,'','t1/start/1',1,'v1',1700000000.0,1,NULL,23,'','{"attempt":1,"inbox":1}');
INSERT INTO "log_entry" VALUES('ses_aaa',3,'assistant',1,'','t1/p0/assistant',1,'v1',1700000000.0,1,NULL,84,'','{"part":0,"text":"","tool_calls":[{"arguments":{"cmd":"ls"},"id":"c1","name":"sh"}]}');
INSERT INTO "log_entry" VALUES('ses_aaa',4,'tool.start',1,'c1','t1/p0/c0/start',1,'v1',1700000000.0,1,NULL,70,'','{"arguments":{"cmd":"ls"},"effect":"local","name":"sh","verify":false}');
INSERT INTO "log_entry" VALUES('ses_aaa',5,'tool.result',1,'c1','t1/p0/c0/result',1,'v1',1700000000.0,1,NULL,20013,'7f512f0e0f95baf8476147e3146929e158977173ed0ecbceb1eb093c314c82b3',NULL);
INSERT INTO "log_entry" VALUES('ses_aaa',6,'compact',1,'','',1,'v1',1700000000.0,1,4,27,'','{"summary":"listed","to":4}');
INSERT INTO "log_entry" VALUES('ses_aaa',7,'x.mine',0,'','',1,'v1',1700000000.0,3,NULL,10,'','{"n":null}');
INSERT INTO "log_entry" VALUES('ses_bbb',6,'fork',0,'','',1,'v1',1700000000.0,1,NULL,27,'','{"at":5,"parent":"ses_aaa"}');
CREATE TABLE log_key (
            session TEXT NOT NULL, key TEXT NOT NULL, position INTEGER NOT NULL, digest BLOB NOT NULL,
            PRIMARY KEY (session, key)
        ) WITHOUT ROWID;
INSERT INTO "log_key" VALUES('ses_aaa','m1',1,X'071D80FA6E9E0C0C1A7B521A83988D10');
INSERT INTO "log_key" VALUES('ses_aaa','t1/p0/assistant',3,X'1C93AE2778DDF522A786695A2E0EF264');
INSERT INTO "log_key" VALUES('ses_aaa','t1/p0/c0/result',5,X'5AF9D2D5205DFAD2E1B242EC98A2493C');
INSERT INTO "log_key" VALUES('ses_aaa','t1/p0/c0/start',4,X'3EE1B96696A38DD6C08EE676BC6331B5');
INSERT INTO "log_key" VALUES('ses_aaa','t1/start/1',2,X'B51BF8725D2B235AFBDDA8D63A86CE48');
CREATE TABLE log_session (
            seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, name TEXT NOT NULL, agent TEXT NOT NULL,
            code_version TEXT NOT NULL, state TEXT NOT NULL, head INTEGER NOT NULL, consumed INTEGER NOT NULL,
            epoch INTEGER NOT NULL, owner TEXT NOT NULL, lease_until REAL NOT NULL, parent TEXT NOT NULL,
            fork_position INTEGER NOT NULL, snapshot TEXT NOT NULL, snapshot_position INTEGER NOT NULL,
            turn INTEGER NOT NULL, attempts INTEGER NOT NULL, created REAL NOT NULL, labels TEXT NOT NULL,
            meta TEXT NOT NULL, lineage TEXT NOT NULL
        );
INSERT INTO "log_session" VALUES(1,'ses_aaa','first','coder','v1','cold',7,0,1,'node1',1700000015.0,'',0,'',0,0,0,1700000000.0,'{"team":"x"}','{"machine":"mch_1"}','[]');
INSERT INTO "log_session" VALUES(2,'ses_bbb','','coder','v1','cold',6,1,1,'node1',1700000015.0,'ses_aaa',5,'',0,1,0,1700000000.0,'{"team":"x"}','{}','[["ses_aaa",1,5]]');
CREATE TABLE recess_migration (room TEXT NOT NULL, number INTEGER NOT NULL, name TEXT NOT NULL, hash TEXT NOT NULL, PRIMARY KEY (room, number));
INSERT INTO "recess_migration" VALUES('contextlog',1,'first','1b8fdee2fef29cb7b3d56524dea43319bbc957c46fd85878cc0d468572c62c42');
CREATE UNIQUE INDEX log_session_name ON log_session (name) WHERE name <> '' AND state <> 'closed';
CREATE INDEX log_entry_mark ON log_entry (session, position) WHERE mark IS NOT NULL;
CREATE INDEX log_entry_inbox ON log_entry (session, position)
            WHERE kind IN ('user', 'answer', 'cancel');
COMMIT;
