# Forty lines as Docker's users type them. Only the command's name is another: `docker` here is a function over `recess`.
docker version
docker images
docker run --rm base true
docker run --rm base echo hello
docker run --rm -e WHO=you -w /tmp base sh -c 'echo $WHO; pwd'
docker run -d --name web -p 8080 -p "$PWD/web.sock":8080 -l tier=front base python3 -m http.server 8080
docker ps
docker ps -q --filter label=tier=front
docker ps --format '{{.Names}} {{.Image}} {{.Status}}'
docker inspect web
docker inspect --format '{{.name}}' web
docker port web 8080
docker exec web echo inside
docker exec -e A=1 -w /usr web sh -c 'test $A = 1 && pwd'
docker exec -u nobody web id -un
docker exec -d web sleep 100
echo content > file.txt
docker cp file.txt web:/root/file.txt
docker exec web cat /root/file.txt
docker cp web:/root/file.txt copy.txt
diff file.txt copy.txt
mkdir -p tree/deep && cp file.txt tree/deep/f && docker cp tree web:/srv
docker cp web:/srv/tree - | tar -t
docker volume create data
docker run --rm -v "$PWD/tree":/in:ro -v data:/data -w /in base sh -c 'cat deep/f > /data/copied; ! touch mine'
docker run --rm -v data:/data base cat /data/copied
docker volume ls -q
test ! -e tree/mine
docker volume rm data
docker top web
docker stats --no-stream web
docker logs web
docker logs --tail 1 web
printf 'ONE=1\nTWO=two words\n' > env.list
docker run --rm --env-file env.list --entrypoint sh -m 512m --cpus 1 --net none base -c 'echo "env $ONE $TWO $(nproc)"'
docker run -d -i --name listen base sh -c 'read word; echo "got $word"'
echo word | docker attach listen
docker logs -f listen
docker run -d --name flaky --restart on-failure:1 base sh -c 'echo try; exit 3'
docker wait flaky | grep 3
docker logs -f flaky
docker events --since 1h --until 1s -f machine=flaky --format '{{.Action}} of {{.name}}'
docker df
docker context ls
docker completion bash | grep -c recess
# What else fingers know.
docker container ls -q --no-trunc
docker ps -l --format json
docker inspect -f '{{.State.Status}} of {{.Config.Image}}' web
docker image ls -q | grep base
docker tag base mine:v1
docker rmi -f mine:v1
docker logs -t --since 1h -n 1 flaky | grep -E '^20[0-9-]+T[0-9:.]+Z try$'
test -z "$(docker logs --until 1h flaky)"
echo 'echo typed into sh' | docker run --rm -i --init --privileged base sh
docker run --rm -u 1000:1000 -v "$PWD/tree":/in:ro base sh -c 'id -u; cat /in/deep/f'
docker exec -i web sh -c 'cat > /root/typed' < file.txt
docker exec web cat /root/typed
truncate -s 1G disk.img && docker cp disk.img web:/root/ && docker cp web:/root/disk.img back.img && cmp -n 1000000 disk.img back.img
echo "sparse $(docker exec web sh -c 'du -m /root/disk.img | cut -f1') $(du -m back.img | cut -f1)"
tar -cSf - disk.img file.txt | docker cp - web:/srv
docker exec web stat -c 'unpacked %s in %b blocks' /srv/disk.img
if docker cp web:/proc/cpuinfo .; then exit 9; fi
docker cp -a web:/usr/bin/passwd . && stat -c 'mode %a' passwd
docker stats --no-stream --format '{{.name}} has figures' web
docker system df
# What Docker has networks and bind mounts of its socket for.
docker run --rm --allow web.recess.internal:8080 base curl -sS http://web.recess.internal:8080/ -o /dev/null -w 'sibling %{http_code}\n'
docker run --rm -v "$PWD/web.sock":/run/web.sock base curl -sS --unix-socket /run/web.sock http://web/ -o /dev/null -w 'socket %{http_code}\n'
# What Docker lacks.
docker exec web sh -c 'echo first > /root/note'
docker snapshot web note:first
docker exec web sh -c 'echo second > /root/note'
docker snapshot web note:second
docker diff note:first note:second
docker fork web --name twin
docker exec twin cat /root/note
docker rewind web note:first
docker exec web sh -c 'echo rewound to $(cat /root/note)'
docker restore note:second --name third -e FROM=afar -l tier=back
docker exec third sh -c 'echo $(cat /root/note) $FROM'
docker suspend third
docker ps -a --filter label=tier=back --format '{{.Names}} {{.Status}}'
docker resume third
docker exec third cat /root/note
ask() { "$PYTHON" -c 'import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.sendall(b"GET / HTTP/1.0\r\n\r\n"); print(sys.argv[2], s.recv(12).decode())' "$@"; }
docker run -d --name nap --idle 1s -p "$PWD/nap.sock":8081 base python3 -m http.server 8081
until ask nap.sock first | grep 200; do :; done
until docker ps -a --filter status=suspended --format '{{.Names}}' | grep nap; do docker logs nap; done
if docker exec --no-wake nap true; then exit 9; fi
ask nap.sock woken
docker exec nap echo still here
docker push note:first --remote "$PWD/remote" --check
docker rm -f twin third listen flaky nap
docker rename web site
docker pause site
docker unpause site
docker restart -t 1 site
docker exec site cat /root/file.txt
docker kill -s TERM site
docker wait site
docker start site
docker stop -t 1 site
docker ps -a --filter status=exited -q
docker create --name later base sh -c 'echo started; exit 7'
docker start -a later || test $? = 7
docker logs later
docker rm site later
docker prune -f
