# Forty lines as Docker's users type them. Only the command's name is another: `docker` here is a function over `recess`.
docker version
docker images
docker run --rm base true
docker run --rm base echo hello
docker run --rm -e WHO=you -w /tmp base sh -c 'echo $WHO; pwd'
docker run -d --name web -p 8080 -l tier=front base python3 -m http.server 8080
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
docker run --rm -v "$PWD/tree":/in:ro -v data:/data -w /in base sh -c 'cat deep/f > /data/copied; touch mine'
docker run --rm -v data:/data base cat /data/copied
docker volume ls -q
test ! -e tree/mine
docker volume rm data
docker top web
docker stats --no-stream web
docker logs web
docker logs --tail 1 web
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
